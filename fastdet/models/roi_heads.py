"""The second stage: sample the proposals that are trained on, pool their features, classify and refine them.

Girshick 2015 (arXiv:1504.08083), section 2. Every step works on the whole batch, in fixed shapes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from fastdet import boxes as box_algebra
from fastdet import ops
from fastdet.interop.attributes import ROI_HEADS_ATTRIBUTES, RefuseAttributes
from fastdet.models import losses
from fastdet.models.anchors import spatial_scale
from fastdet.models.layers import Constants, ConvFCHead, MaskedBatchNorm2d, init_normal, narrow
from fastdet.models.settings import Settings
from fastdet.structures import Batch, Detections, Proposals, Samples, Targets

# Pairs of a proposal and a class whose boxes are in memory at a time: 2 MiB an image, and on a GPU, where few large
# launches are faster, 64 MiB for all images together.
_MOST_PAIRS, _MOST_PAIRS_ON_GPU = 1 << 17, 1 << 22


class RoIOutput(NamedTuple):
    """What a pass of `RoIHeads` gives, N being the samples with targets, else the proposals.

    losses: "loss_classifier" and "loss_box_reg"; None without targets.
    samples: what was trained on; None without targets.
    detections: None with targets.
    pooled: [B, N, C, h, w]. box_features: [B, N, D], the output of the box head.
    class_logits: [B, N, classes], the background's first. box_deltas: [B, N, 4 * classes].
    """

    losses: dict[str, Tensor] | None
    samples: Samples | None
    detections: Detections | None
    pooled: Tensor
    box_features: Tensor
    class_logits: Tensor
    box_deltas: Tensor


class RoIHeads(RefuseAttributes, nn.Module):
    """The box head and predictor, and everything around them.

    Args:
        in_channels: of the pooled features.
        num_classes: with the background.
        settings: of the detector.
        box_head, box_predictor: in place of torchvision's `TwoMLPHead` (or `ConvFCHead`) and `FastRCNNPredictor`.
    """

    refused_attributes = ROI_HEADS_ATTRIBUTES

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        settings: Settings,
        box_head: nn.Module | None = None,
        box_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._num_classes = num_classes
        self.box_head = _build_box_head(in_channels, settings) if box_head is None else box_head
        if box_predictor is None:
            predictor = FastRCNNPredictor(_out_features(self.box_head, settings), num_classes)
            if settings.box_predictor_std is not None:
                init_normal(predictor.cls_score, settings.box_predictor_std[0])
                init_normal(predictor.bbox_pred, settings.box_predictor_std[1])
            box_predictor = predictor
        self.box_predictor = box_predictor
        weights = settings.class_weights
        self._class_weights = Constants(**{} if weights is None else {"each": torch.tensor(weights, device="cpu")})

    @property
    def settings(self) -> Settings:
        """Those of the detector, which sets them for all its parts."""
        return self._settings

    @property
    def num_classes(self) -> int:
        """With the background; of the predictor as it is now, which may have been replaced."""
        return _classes_of(self.box_predictor) or self._num_classes

    @property
    def class_weights(self) -> Tensor | None:
        """The settings' weights, fp32 [classes] on the module's device; None without."""
        return next(iter(self._class_weights.on(next(self.parameters()).device)), None)

    def forward(
        self, features: Mapping[str, Tensor], proposals: Proposals, batch: Batch, targets: Targets | None = None
    ) -> RoIOutput:
        """The losses of sampled proposals where there are targets, else the detections of all proposals.

        Args:
            features: all levels of the backbone by name, [B, C, H, W] each, in the order of the anchors' levels.
            proposals: with targets those of training, else of evaluation.
            batch: the images that the features are of. targets: ground truth to train on.

        Raises:
            ValueError: a name in `box_featmap_names` is not among the features, several levels are max-pooled, or the
                targets have no row.
        """
        samples = None if targets is None else self.select_training_samples(proposals, losses.require_targets(targets))
        boxes, valid = (proposals.boxes, proposals.valid) if samples is None else (samples.boxes, samples.weight > 0)
        pooled = self._pool(features, batch, boxes, valid)
        flat = pooled.flatten(0, 1)
        takes_valid = getattr(self.box_head, "takes_valid", False)
        hidden = self.box_head(flat, valid.flatten()) if takes_valid else self.box_head(flat)
        box_features, class_logits, box_deltas = (
            part.unflatten(0, valid.shape) for part in (hidden, *self.box_predictor(hidden))
        )
        box_losses, detections = None, None
        if samples is None:
            detections = self.postprocess_detections(class_logits, box_deltas, proposals, batch.sizes)
        else:
            box_losses = {
                "loss_classifier": losses.classifier(class_logits, samples, self.class_weights),
                "loss_box_reg": losses.box(box_deltas, samples, self.settings.box_smooth_l1_beta),
            }
        return RoIOutput(box_losses, samples, detections, pooled, box_features, class_logits, box_deltas)

    @torch.no_grad()
    def select_training_samples(self, proposals: Proposals, targets: Targets) -> Samples:
        """A fixed number of proposals and ground-truth boxes, drawn at random after matching them to the ground truth.

        Section 2.3: positive from `box_fg_iou_thresh` on, background from `box_bg_iou_thresh_low` to
        `box_bg_iou_thresh`.
        """
        settings = self.settings
        candidates = torch.cat([proposals.boxes, targets.boxes], dim=1)
        matches = ops.match(
            candidates,
            targets.boxes,
            targets.valid,
            high=settings.box_fg_iou_thresh,
            low=settings.box_bg_iou_thresh,
            valid=torch.cat([proposals.valid, targets.valid], dim=1),
            weights=settings.bbox_reg_weights,
            **targets.ignored(settings.ignore_iof_thresh),
        )
        # Background without overlap teaches little; in an image without ground truth all of it may be drawn.
        without_overlap = (matches.iou < settings.box_bg_iou_thresh_low) & targets.valid.any(1, keepdim=True)
        label = torch.where(without_overlap, -1, matches.label)
        num_samples = settings.box_batch_size_per_image
        seeds = None if targets.seeds is None else targets.seeds + 1  # other draws than the RPN's
        sampled = ops.sample(label, num_samples, int(num_samples * settings.box_positive_fraction), seeds)
        positive = (label.gather(1, sampled.index) == 1) & (sampled.weight > 0)
        rows = sampled.index[..., None].expand(-1, -1, 4)
        boxes = torch.where(sampled.weight[..., None] > 0, candidates.gather(1, rows), 0.0)
        best = matches.index.gather(1, sampled.index)
        labels = torch.where(positive, targets.labels.gather(1, best), 0)
        deltas = torch.where(positive[..., None], matches.deltas.gather(1, rows), 0.0)
        return Samples(boxes, labels, deltas, sampled.weight)

    def postprocess_detections(
        self, class_logits: Tensor, box_deltas: Tensor, proposals: Proposals, sizes: Tensor
    ) -> Detections:
        """Refined boxes of every class but the background, suppressed within each image and class.

        `class_logits` [B, P, classes], `box_deltas` [B, P, 4 * classes], of which boxes and scores carry gradients;
        `sizes` int64 [B, 2] clips the boxes.
        """
        batch, count, classes = class_logits.shape
        cap = self.settings.box_detections_per_img
        per_class = count if cap is None else min(cap, count)
        total = (classes - 1) * per_class if cap is None else min(cap, (classes - 1) * per_class)
        scores = class_logits.float().softmax(-1)[..., 1:].transpose(1, 2)
        deltas = box_deltas.unflatten(-1, (classes, 4))[:, :, 1:].transpose(1, 2)
        if scores.is_cpu and not ops.is_recorded(scores):
            # A look at values is no host sync here.
            candidate = (scores > self.settings.box_score_thresh) & proposals.valid[:, None]
            if 4 * int(candidate.sum()) <= candidate.numel():
                return self._suppress_candidates(candidate.nonzero().unbind(1), scores, deltas, proposals, sizes, total)
        most = _MOST_PAIRS_ON_GPU // max(batch, 1) if scores.is_cuda else _MOST_PAIRS
        size = max(most // max(count, 1), 1)
        blocks = zip(scores.split(size, dim=1), deltas.split(size, dim=1), strict=True)
        kept = [self._suppress_classes(*block, proposals, sizes, per_class) for block in blocks]
        boxes, scores, index = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
        # The classes of an image are merged by score.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :total], order[:, :total]
        found = scores > -math.inf
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return Detections(
            torch.where(found[..., None], boxes, 0.0),
            torch.where(found, scores, 0.0),
            torch.where(found, order // max(per_class, 1) + 1, 0),
            found.sum(1),
            torch.where(found, index.gather(1, order), 0),
        )

    def _suppress_candidates(
        self,
        candidates: Sequence[Tensor],
        scores: Tensor,
        deltas: Tensor,
        proposals: Proposals,
        sizes: Tensor,
        total: int,
    ) -> Detections:
        """As `postprocess_detections`, with work for the candidates alone: image, class and proposal [N] each."""
        image, label, row = candidates
        boxes, settings = self._decode(deltas[candidates], proposals.boxes[image, row], sizes[image]), self.settings
        large = box_algebra.are_as_large(boxes, settings.box_min_size).nonzero()[:, 0]
        group = image * scores.shape[1] + label
        kept = large[ops.batched_nms(boxes[large], scores[candidates][large], group[large], settings.box_nms_thresh)]
        # By image, and in descending order of score: so many of each as the result holds.
        kept = kept[image[kept].argsort(stable=True)]
        count = image[kept].bincount(minlength=len(sizes))
        place = torch.arange(len(kept), device=kept.device) - (count.cumsum(0) - count)[image[kept]]
        kept, place = kept[place < total], place[place < total]

        def padded(values: Tensor) -> Tensor:
            empty = values.new_zeros(len(sizes), total, *values.shape[1:])
            return empty.index_put((image[kept], place), values[kept])

        found = padded(boxes), padded(scores[candidates]), padded(label + 1)
        return Detections(*found, count=count.clamp(max=total), index=padded(row))

    def _decode(self, deltas: Tensor, reference: Tensor, sizes: Tensor) -> Tensor:
        """Boxes [B, ..., 4] at `deltas`, clipped to `sizes` [B, 2]."""
        weights, clamp = self.settings.bbox_reg_weights, self.settings.bbox_xform_clip
        return box_algebra.clip(box_algebra.decode(deltas.float(), reference, weights, clamp=clamp), sizes)

    def _suppress_classes(
        self, scores: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor, max_keep: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [B, N, 4], scores [B, N], -inf past those kept, and proposals [B, N], class after class.

        `scores` [B, classes, P] and `deltas` [B, classes, P, 4] are of some classes; each of their groups of an image
        and a class is suppressed by itself.
        """
        settings, batch = self.settings, scores.shape[0]
        boxes = self._decode(deltas, proposals.boxes[:, None], sizes)
        valid = (scores > settings.box_score_thresh) & proposals.valid[:, None]
        valid &= box_algebra.are_as_large(boxes, settings.box_min_size)
        boxes, scores = boxes.flatten(0, 1), scores.flatten(0, 1)
        kept = ops.nms_padded(boxes, scores, settings.box_nms_thresh, max_keep, valid.flatten(0, 1))
        scores = torch.where(kept.valid, scores.gather(1, kept.index), -math.inf)
        boxes = boxes.gather(1, kept.index[..., None].expand(-1, -1, 4))
        return boxes.reshape(batch, -1, 4), scores.reshape(batch, -1), kept.index.reshape(batch, -1)

    def _pool(self, features: Mapping[str, Tensor], batch: Batch, boxes: Tensor, valid: Tensor) -> Tensor:
        """Features of `boxes` [B, N, 4], [B, N, C, size, size], each from the level for its size; 0 if not `valid`."""
        settings, size = self.settings, self.settings.box_pool_size
        names = settings.box_featmap_names or tuple(features)
        missing = set(names) - set(features)
        if missing:
            raise ValueError(
                f"box_featmap_names {sorted(missing)} are not among the backbone's levels: give the detector "
                f"box_featmap_names={tuple(features)}, or some of these"
            )
        grids = [(level.shape[-2], level.shape[-1]) for level in features.values()]
        strides = settings.rpn_anchor_generator.level_strides(batch.padded_size, grids)
        scales = {name: spatial_scale(stride[0]) for name, stride in zip(features, strides, strict=True)}
        dtype, levels = features[names[0]].dtype, narrow(features[name] for name in names)
        if settings.box_pooling == "align":
            ratio, aligned, factors = settings.box_sampling_ratio, settings.box_aligned, [scales[k] for k in names]
            return ops.batched_roi_align(levels, boxes, size, factors, ratio, aligned, valid).to(dtype)
        if len(names) > 1:
            raise ValueError(f"box_pooling 'max' pools from one level, not from {list(names)}: see box_featmap_names")
        return ops.batched_roi_pool(levels[0], boxes, size, scales[names[0]], valid).to(dtype)


def _build_box_head(in_channels: int, settings: Settings) -> nn.Module:
    pooled, size = settings.box_pool_size, settings.box_representation_size
    if settings.box_num_convs:
        widths = [in_channels] * settings.box_num_convs
        return ConvFCHead((in_channels, pooled, pooled), widths, [size], norm_layer=MaskedBatchNorm2d)
    return TwoMLPHead(in_channels * pooled**2, size)


def _out_features(box_head: nn.Module, settings: Settings) -> int:
    """How many features a box head gives for a RoI: those of its last linear layer, if it has one."""
    linear = [layer for layer in box_head.modules() if isinstance(layer, nn.Linear)]
    return linear[-1].out_features if linear else settings.box_representation_size


def _classes_of(box_predictor: nn.Module | None) -> int | None:
    classes = getattr(getattr(box_predictor, "cls_score", None), "out_features", None)
    return None if classes is None else int(classes)


def count_classes(num_classes: int | None, box_predictor: nn.Module | None) -> int:
    """The number of classes with the background: as given, or of the predictor; ValueError if there are fewer than two,
    or the two disagree."""
    found = _classes_of(box_predictor)
    number = found if num_classes is None else num_classes
    if not isinstance(number, int) or number < 2:
        raise ValueError(f"num_classes counts the background, so it is at least 2, got {num_classes!r}")
    if found is not None and found != number:
        raise ValueError(f"num_classes is {number}, but box_predictor has {found}")
    return number
