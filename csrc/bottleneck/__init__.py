"""Bottleneck adapters: two thin products with all that is around them. The maths is in README.md."""
