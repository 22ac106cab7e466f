"""What people see of a run: boxes on images, curves, event files for TensorBoard, the report of an evaluation."""

from fastdet.visualize.boxes import class_color, draw_detections, tile
from fastdet.visualize.curves import plot_average_precision, plot_comparison, plot_losses
from fastdet.visualize.report import write_report
from fastdet.visualize.tensorboard import require_tensorboard, write_events

__all__ = [
    "class_color",
    "draw_detections",
    "plot_average_precision",
    "plot_comparison",
    "plot_losses",
    "require_tensorboard",
    "tile",
    "write_events",
    "write_report",
]
