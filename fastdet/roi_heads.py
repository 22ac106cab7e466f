"""The second stage: sample the proposals that train, pool their features, classify and refine them.

Girshick 2015 (arXiv:1504.08083), section 2. Every step works on the whole batch in fixed shapes.
"""

import math

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from . import boxes as box_algebra
from . import losses, ops
from .config import Settings
from .rpn import start_normal
from .structures import Detections, Proposals, Samples, Targets


class RoIHeads(nn.Module):
    """The box head and predictor, and everything around them."""

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
        size = settings.box_representation_size
        self.box_head = TwoMLPHead(in_channels * settings.box_pool_size**2, size) if box_head is None else box_head
        if box_predictor is None:
            features = getattr(getattr(self.box_head, "fc7", None), "out_features", size)
            predictor = FastRCNNPredictor(features, num_classes)
            start_normal(predictor.cls_score, std=0.01)
            start_normal(predictor.bbox_pred, std=0.001)
            box_predictor = predictor
        self.box_predictor = box_predictor

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
        truth = targets.boxes.gather(1, best[..., None].expand(-1, -1, 4))
        locs = box_algebra.encode(boxes, truth, settings.bbox_reg_weights)
        return Samples(boxes, labels, torch.where(positive[..., None], locs, 0.0), sampled.weight)

    def pool(self, features: list[Tensor], boxes: Tensor, valid: Tensor, scales: list[float]) -> Tensor:
        """Features of each box [B, N, C, size, size], from the level that its size belongs to; 0 if not `valid`.

        `scales` are the levels' cells a pixel.
        """
        if len(features) == 1:
            return self._pool_level(features[0], boxes, valid, scales[0])
        level = _level_of(boxes, scales)
        pooled = [
            self._pool_level(feature, boxes, valid & (level == i), scale)
            for i, (feature, scale) in enumerate(zip(features, scales, strict=True))
        ]
        return torch.stack(pooled).sum(0)

    def _pool_level(self, feature: Tensor, boxes: Tensor, valid: Tensor, scale: float) -> Tensor:
        size = self.settings.box_pool_size
        if self.settings.box_pooling == "max":
            return ops.batched_roi_pool(feature, boxes, size, scale, valid)
        batch, count, _ = boxes.shape
        image = torch.arange(batch, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(batch, count, 1)
        rois = torch.cat([image, boxes], dim=2).flatten(0, 1)
        # The operator takes features and boxes of one type, and in half precision a box would move by pixels.
        pooled = torchvision.ops.roi_align(feature.float(), rois, size, scale, self.settings.box_sampling_ratio)
        pooled = pooled.to(feature.dtype).unflatten(0, (batch, count))
        return torch.where(valid[..., None, None, None], pooled, 0.0)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, classes] and normalised offsets [B, N, 4 * classes] of `pooled` [B, N, C, h, w]."""
        batch, count = pooled.shape[:2]
        scores, locs = self.box_predictor(self.box_head(pooled.flatten(0, 1)))
        return scores.unflatten(0, (batch, count)), locs.unflatten(0, (batch, count))

    def losses(self, scores: Tensor, locs: Tensor, samples: Samples) -> dict[str, Tensor]:
        return {
            "loss_classifier": losses.classifier(scores, samples),
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
        )


def _level_of(boxes: Tensor, scales: list[float]) -> Tensor:
    """int64 [B, N]: index of the level for each box. Lin et al. 2017 (arXiv:1612.03144), equation 1."""
    width, height = box_algebra.sides(boxes)
    lowest, highest = -math.log2(scales[0]), -math.log2(scales[-1])
    level = torch.floor(4 + torch.log2((width * height).clamp(min=0).sqrt() / 224) + 1e-6)
    return (level.clamp(lowest, highest) - lowest).long()
