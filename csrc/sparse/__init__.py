"""Sparse fine-tuning: products with masks, selection, statistics, gates, optimizer. The maths is in README.md."""
