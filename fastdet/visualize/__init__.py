"""Images for people: boxes on images, curves of the losses, the report of an evaluation."""

from fastdet.visualize.boxes import class_color, draw_detections, tile
from fastdet.visualize.curves import plot_losses
from fastdet.visualize.report import write_report

__all__ = ["class_color", "draw_detections", "plot_losses", "tile", "write_report"]
