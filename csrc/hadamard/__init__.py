"""The Walsh-Hadamard transform and Fastfood, the projection of Intrinsic SAID. The maths is in README.md."""
