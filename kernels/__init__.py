"""Tensor kernels: native CPU and a plain-torch reference, one signature each."""
