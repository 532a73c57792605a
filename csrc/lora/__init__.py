"""LoRA, y += scale * (drop(x) a^T) b^T, and its gradients. The maths is in README.md."""
