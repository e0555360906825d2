"""Kernels: the operations that carry the mixers, one folder each."""
