"""The second stage: sample the proposals that train, pool their features, classify and refine them.

Girshick 2015 (arXiv:1504.08083), section 2. Every step works on the whole batch in fixed shapes.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead

from fastdet import boxes as box_algebra
from fastdet import ops
from fastdet.models import losses
from fastdet.models.norms import RowBatchNorm2d
from fastdet.models.rpn import start_normal
from fastdet.models.settings import Settings, refuse
from fastdet.structures import Detections, Proposals, Samples, Targets

# torchvision's attributes that are settings here: assigned, they would change nothing.
_SETTINGS = {
    "score_thresh": "box_score_thresh",
    "nms_thresh": "box_nms_thresh",
    "detections_per_img": "box_detections_per_img",
    "box_roi_pool": "box_pooling",
}


class RoIHeads(nn.Module):
    """The box head and predictor, and everything around them."""

    _class_weights: Tensor | None

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        settings: Settings,
        box_head: nn.Module | None = None,
        box_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.box_head = _box_head(in_channels, settings) if box_head is None else box_head
        if box_predictor is None:
            predictor = FastRCNNPredictor(_width(self.box_head, settings), num_classes)
            for layer, std in zip(
                (predictor.cls_score, predictor.bbox_pred), settings.box_predictor_std or (), strict=False
            ):
                start_normal(layer, std)
            box_predictor = predictor
        self.box_predictor = box_predictor
        weights = settings.class_weights
        self.register_buffer("_class_weights", None if weights is None else torch.tensor(weights), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(name, _SETTINGS)
        super().__setattr__(name, value)

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> Samples:
        """Proposals and ground truth together, labelled by their overlap, a fixed number of them drawn."""
        settings = self.settings
        candidates = torch.cat([proposals.boxes, targets.boxes], dim=1)
        valid = torch.cat([proposals.taken, targets.valid], dim=1)
        matches = ops.match(
            candidates,
            targets.boxes,
            targets.valid,
            high=settings.box_fg_iou_thresh,
            low=settings.box_bg_iou_thresh,
            valid=valid,
            weights=settings.bbox_reg_weights,
            **targets.ignored(settings.ignore_iof_thresh),
        )
        # Background too far from everything teaches little; where there is nothing, all is background.
        far = (matches.iou < settings.box_bg_iou_thresh_low) & targets.valid.any(1, keepdim=True)
        role = torch.where(far, -1, matches.label)
        num_samples = settings.box_batch_size_per_image
        sampled = ops.sample(role, num_samples, int(num_samples * settings.box_positive_fraction))
        positive = (role.gather(1, sampled.index) == 1) & (sampled.weight > 0)
        rows = sampled.index[..., None].expand(-1, -1, 4)
        boxes = torch.where(sampled.weight[..., None] > 0, candidates.gather(1, rows), 0.0)
        best = matches.index.gather(1, sampled.index)
        labels = torch.where(positive, targets.labels.gather(1, best), 0)
        locs = matches.deltas.gather(1, rows)
        return Samples(boxes, labels, torch.where(positive[..., None], locs, 0.0), sampled.weight)

    def pool(self, features: list[Tensor], boxes: Tensor, valid: Tensor, scales: list[float]) -> Tensor:
        """Features of each box [B, N, C, size, size], from the level that its size belongs to; 0 if not `valid`.

        `scales` are the levels' cells a pixel.
        """
        settings, size = self.settings, self.settings.box_pool_size
        if settings.box_pooling == "align":
            ratio, aligned = settings.box_sampling_ratio, settings.box_aligned
            return ops.batched_roi_align(features, boxes, size, scales, ratio, aligned, valid)
        if len(features) == 1:
            return ops.batched_roi_pool(features[0], boxes, size, scales[0], valid)
        level = _level_of(boxes, scales)
        pooled = [
            ops.batched_roi_pool(feature, boxes, size, scale, valid & (level == k))
            for k, (feature, scale) in enumerate(zip(features, scales, strict=True))
        ]
        return torch.stack(pooled).sum(0)

    def forward(self, pooled: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `pooled` [B, N, C, h, w]: class logits [B, N, classes], normalised offsets [B, N, 4 * classes], and the
        box head's output [B, N, D] that both are made of. Rows that are not `valid` (bool [B, N]) are padding."""
        norms = [layer for layer in self.box_head.modules() if isinstance(layer, RowBatchNorm2d)]
        for norm in norms:
            norm.rows = valid.flatten()
        hidden = self.box_head(pooled.flatten(0, 1))
        for norm in norms:
            norm.rows = None
        parts = *self.box_predictor(hidden), hidden
        scores, locs, hidden = (part.unflatten(0, pooled.shape[:2]) for part in parts)
        return scores, locs, hidden

    def losses(self, scores: Tensor, locs: Tensor, samples: Samples) -> dict[str, Tensor]:
        return {
            "loss_classifier": losses.classifier(scores, samples, self._class_weights),
            "loss_box_reg": losses.box(locs, samples, self.settings.box_smooth_l1_beta),
        }

    @torch.no_grad()
    def detect(self, scores: Tensor, locs: Tensor, proposals: Proposals, sizes: Tensor) -> Detections:
        """Refined boxes of every class but background, suppressed within each image and class."""
        settings = self.settings
        batch, count, classes = scores.shape
        probability = scores.float().softmax(-1)[..., 1:].transpose(1, 2)
        deltas = locs.float().unflatten(-1, (classes, 4))[:, :, 1:].transpose(1, 2)
        boxes = box_algebra.decode(
            deltas, proposals.boxes[:, None], settings.bbox_reg_weights, clamp=settings.bbox_xform_clip
        )
        boxes = box_algebra.clip(boxes, sizes)
        width, height = box_algebra.sides(boxes)
        valid = (probability > settings.box_score_thresh) & proposals.taken[:, None]
        valid &= (width >= settings.box_min_size) & (height >= settings.box_min_size)

        # One group an image and class; then the classes of an image are merged by score.
        groups, cap = batch * (classes - 1), settings.box_detections_per_img
        per_group = count if cap is None else min(cap, count)
        boxes, probability = boxes.reshape(groups, count, 4), probability.reshape(groups, count)
        kept = ops.nms_padded(boxes, probability, settings.box_nms_thresh, per_group, valid.reshape(groups, count))
        taken = torch.arange(per_group, device=sizes.device) < kept.count[:, None]
        best = torch.where(taken, probability.gather(1, kept.index), -math.inf).reshape(batch, -1)
        boxes = boxes.gather(1, kept.index[..., None].expand(-1, -1, 4)).reshape(batch, -1, 4)
        total = best.shape[1] if cap is None else min(cap, best.shape[1])
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :total], order[:, :total]
        found = best > -math.inf
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return Detections(
            torch.where(found[..., None], boxes, 0.0),
            torch.where(found, best, 0.0),
            torch.where(found, order // per_group + 1, 0),
            found.sum(1),
            torch.where(found, kept.index.reshape(batch, -1).gather(1, order), 0),
        )


def _box_head(in_channels: int, settings: Settings) -> nn.Module:
    pooled, size = settings.box_pool_size, settings.box_representation_size
    if settings.box_num_convs:
        widths = [in_channels] * settings.box_num_convs
        return FastRCNNConvFCHead((in_channels, pooled, pooled), widths, [size], norm_layer=RowBatchNorm2d)
    return TwoMLPHead(in_channels * pooled**2, size)


def _width(box_head: nn.Module, settings: Settings) -> int:
    """How many numbers a box head gives for a RoI: as its last linear layer says, if it has any."""
    linear = [layer for layer in box_head.modules() if isinstance(layer, nn.Linear)]
    return linear[-1].out_features if linear else settings.box_representation_size


def _level_of(boxes: Tensor, scales: list[float]) -> Tensor:
    """int64 [B, N]: the level that RoI max-pool takes each box from, by the rule of RoI align."""
    width, height = box_algebra.sides(boxes)
    lowest, highest = -math.log2(scales[0]), -math.log2(scales[-1])
    level = torch.floor(4 + torch.log2((width * height).clamp(min=0).sqrt() / 224) + 1e-6)
    return (level.clamp(lowest, highest) - lowest).long()
