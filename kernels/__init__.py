"""Triton kernels, one file per op. Importing this package does not import Triton."""
