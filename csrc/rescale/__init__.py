"""(IA)^3 rescaling, y = x * l. The maths is in README.md."""
