"""Kernels, one folder per op. setup.py maps this folder to the package `peft_kernels.kernels`."""
