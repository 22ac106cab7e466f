"""A whole training step, or a whole detection, as one CUDA graph for each padded shape."""

from fastdet.graphs.detector import GraphedDetector
from fastdet.graphs.trainer import GraphedTrainer

__all__ = ["GraphedDetector", "GraphedTrainer"]
