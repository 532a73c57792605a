"""NF4 weights in 4 bits and their linear layers. The maths is in README.md."""
