"""The padded results that pass between the steps: fixed shapes, with a count or a mask for what varies in number.

B images, K anchors, G ground-truth boxes, P proposals, S samples, D detections. Boxes are x1, y1, x2, y2 in pixels of
the resized image, fp32; labels are int64, 0 is background. Named tuples, so that torch.compile and torch.export can
take them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images [B, C, H, W] fp32, normalized and padded; sizes int64 [B, 2], (height, width) inside the padding; scales
    fp32 [B], by how much each image was resized."""

    images: Tensor
    sizes: Tensor
    scales: Tensor

    @property
    def padded_size(self) -> tuple[int, int]:
        """(height, width) with the padding."""
        return self.images.shape[-2], self.images.shape[-1]


class Targets(NamedTuple):
    """Ground truth: boxes [B, G, 4], labels [B, G] (0 = padding), ignore bool [B, G] (not trained on); seeds int64 [B],
    of what is sampled in each image (None: torch's generator draws them)."""

    boxes: Tensor
    labels: Tensor
    ignore: Tensor
    seeds: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """bool [B, G]: the boxes that are trained on."""
        return (self.labels > 0) & ~self.ignore

    def ignored(self, iof_thresh: float | None) -> dict[str, Any]:
        """The arguments of `ops.match` for the ignored boxes; none of them if `iof_thresh` is None."""
        if iof_thresh is None:
            return {}
        return {"gt_ignore": (self.labels > 0) & self.ignore, "ignore_iof": iof_thresh}


class AnchorTargets(NamedTuple):
    """What the RPN is trained on: labels [B, K] in {-1, 0, 1} after sampling, deltas [B, K, 4], 0 where an anchor is
    not positive."""

    labels: Tensor
    deltas: Tensor


class Proposals(NamedTuple):
    """The boxes of the RPN in descending order of score: boxes [B, P, 4], scores [B, P] (logits), count [B]."""

    boxes: Tensor
    scores: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count

    @property
    def valid(self) -> Tensor:
        """bool [B, P]: the rows that are not padding."""
        return torch.arange(self.boxes.shape[1], device=self.count.device) < self.count[:, None]


class Samples(NamedTuple):
    """The RoIs that the box head is trained on: boxes [B, S, 4], labels [B, S], deltas [B, S, 4] (times
    `bbox_reg_weights`; 0 for background), weight [B, S] (0 = padding)."""

    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    weight: Tensor


class Detections(NamedTuple):
    """Final boxes in descending order of score: boxes [B, D, 4], scores [B, D], labels [B, D], count [B]; index int64
    [B, D], the proposal that each comes from."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
