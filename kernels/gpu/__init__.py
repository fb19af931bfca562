"""Tensor kernels in Triton, each with the signature of its torch reference in `kernels`."""
