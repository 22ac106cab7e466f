"""Training, checkpoints, evaluation and detection.

`evaluate` is `fastdet.engine.evaluate.evaluate`: exported here it would hide its module.
"""

from fastdet.engine.checkpoint import CheckpointError, build_model, describe_anchors, load_model
from fastdet.engine.predict import ImageDetections, detect
from fastdet.engine.recipes import RECIPES, TrainSettings, build_optimizer
from fastdet.engine.run.folder import Terminated
from fastdet.engine.trainer import train

__all__ = [
    "RECIPES",
    "CheckpointError",
    "ImageDetections",
    "Terminated",
    "TrainSettings",
    "build_model",
    "build_optimizer",
    "describe_anchors",
    "detect",
    "load_model",
    "train",
]
