"""Triton kernels; import their modules only where they run."""
