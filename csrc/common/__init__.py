"""What several ops share: C++ and CUDA headers, and helpers for Triton kernels."""
