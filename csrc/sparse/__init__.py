"""Sparse fine-tuning: products with W + D, gradients at a mask, selection, statistics, gates, optimizer."""
