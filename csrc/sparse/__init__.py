"""Sparse fine-tuning: products with W + D, D sparse, and gradients at the mask alone. The maths is in README.md."""
