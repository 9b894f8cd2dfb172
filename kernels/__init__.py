"""Triton kernels, one file per op, each under the name of its op in ``fastdg.ops``."""
