"""Products with a Kronecker product that is never formed. The maths is in README.md."""
