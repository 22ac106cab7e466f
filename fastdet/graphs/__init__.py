"""A whole training step, or a whole detection, as one CUDA graph for each padded shape."""

from fastdet.graphs.trainer import GraphedDetector, GraphedTrainer

__all__ = ["GraphedDetector", "GraphedTrainer"]
