"""fastdet: the two-stage object detector as batched, fixed-shape tensor operations with Triton kernels."""

from . import ops

__all__ = ["ops"]
