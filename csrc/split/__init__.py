"""Linear layers with some trained rows (FAR). The maths is in README.md."""
