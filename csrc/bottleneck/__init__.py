"""Bottleneck adapters: two thin products with an activation between them. The maths is in README.md."""
