"""The padded results that pass between the steps: fixed shapes, with a count or a mask for what varies in number.

B images, G ground-truth boxes, P proposals, S samples, D detections. Boxes are x1, y1, x2, y2 in pixels of the resized
image, fp32; labels are int64, 0 is background. Named tuples, so that torch.compile and torch.export can take them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Ground truth: boxes [B, G, 4], labels [B, G] (0 = padding), ignore bool [B, G] (not trained on)."""

    boxes: Tensor
    labels: Tensor
    ignore: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [B, G]: the boxes that are trained on."""
        return (self.labels > 0) & ~self.ignore

    def ignored(self, share: float | None) -> dict[str, Any]:
        """What `ops.match` is told of the boxes that are ignored; None: nothing."""
        return {} if share is None else {"gt_ignore": (self.labels > 0) & self.ignore, "ignore_iof": share}


class Proposals(NamedTuple):
    """What the RPN suggests, in descending order of score: boxes [B, P, 4], scores [B, P] (logits), count [B]."""

    boxes: Tensor
    scores: Tensor
    count: Tensor  # type: ignore[assignment]

    @property
    def taken(self) -> Tensor:
        """bool [B, P]: the rows that hold a proposal."""
        return torch.arange(self.boxes.shape[1], device=self.count.device) < self.count[:, None]


class AnchorTargets(NamedTuple):
    """What each anchor should say: labels [B, K] in {-1, 0, 1} after sampling, locs [B, K, 4] encoded offsets, 0 where
    an anchor is no positive."""

    labels: Tensor
    locs: Tensor


class Samples(NamedTuple):
    """RoIs that the box head trains on: boxes [B, S, 4], labels [B, S], locs [B, S, 4] (encoded and normalised
    offsets), weight [B, S] (0 = padding)."""

    boxes: Tensor
    labels: Tensor
    locs: Tensor
    weight: Tensor


class Detections(NamedTuple):
    """Final boxes in descending order of score: boxes [B, D, 4], scores [B, D], labels [B, D], count [B], and of each
    the proposal that it comes from, index int64 [B, D]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]
    index: Tensor  # type: ignore[assignment]


class HeadOutput(NamedTuple):
    """For each level the convolutions' raw outputs: logits [B, A * L, H, W] and deltas [B, A * 4, H, W]."""

    logits: list[Tensor]
    deltas: list[Tensor]


class Seen(NamedTuple):
    """What both passes start from.

    features: all levels. pooled_levels: those that boxes are pooled from; pooled_scales: their cells a pixel.
    pooled_shift: [B, 4], by how many pixels boxes move before they are pooled; None: not at all.
    output: of the RPN's head. image_size: the padded (height, width).
    cells: for each level bool [B, H, W], which cells belong to each image; None: all.
    """

    features: list[Tensor]
    pooled_levels: list[Tensor]
    pooled_scales: list[float]
    pooled_shift: Tensor | None
    output: HeadOutput
    image_size: tuple[int, int]
    cells: list[Tensor] | None
