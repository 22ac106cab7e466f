"""The region proposal network: anchors, their scores and deltas, the proposals, and the losses of both.

Ren et al. 2015 (arXiv:1506.01497), section 3. Every step works on the whole batch, in shapes that depend on the
settings and the padded image size alone.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdet import boxes as box_algebra
from fastdet import ops
from fastdet.interop.attributes import RPN_ATTRIBUTES, RefuseAttributes
from fastdet.models import anchors as anchor_boxes
from fastdet.models import losses
from fastdet.models.anchors import Size
from fastdet.models.layers import Constants, init_normal, narrow
from fastdet.models.settings import Settings
from fastdet.structures import AnchorTargets, Batch, Proposals, Targets

# From so many values in a row on, torch's `topk` on CUDA divides a row among blocks; below, one block does it all.
MULTI_BLOCK_TOPK = 20_000


class RPNHead(nn.Module):
    """3x3 convolutions, one by default, and two 1x1 ones over every level; the names of torchvision's head.

    Gives for each level the logits [B, A * L, H, W] and the deltas [B, A * 4, H, W] of A anchors a cell, with L =
    `logits_per_anchor`.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, num_anchors: int, logits_per_anchor: int, depth: int = 1
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * depth]
        convolutions = [nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in pairwise(widths)]
        self.conv = nn.Sequential(*(nn.Sequential(layer, nn.ReLU(inplace=True)) for layer in convolutions))
        self.cls_logits = nn.Conv2d(hidden_channels, num_anchors * logits_per_anchor, kernel_size=1)
        self.bbox_pred = nn.Conv2d(hidden_channels, num_anchors * 4, kernel_size=1)
        for layer in (*convolutions, self.cls_logits, self.bbox_pred):
            init_normal(layer, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(level) for level in features]
        return [self.cls_logits(level) for level in hidden], [self.bbox_pred(level) for level in hidden]


class RPNOutput(NamedTuple):
    """What a pass of `RegionProposalNetwork` gives; None for what was not asked for.

    proposals: by the hyperparameters of evaluation.
    training_proposals: by those of training.
    losses: "loss_objectness" and "loss_rpn_box_reg".
    anchors: fp32 [K, 4], level after level; in each by row, column and anchor of the cell.
    logits: [B, K, L], in the order of the anchors. deltas: [B, K, 4].
    anchors_inside: bool [B, K], the anchors that lie inside each image.
    anchor_targets: what the losses compare with.
    """

    proposals: Proposals | None = None
    training_proposals: Proposals | None = None
    losses: dict[str, Tensor] | None = None
    anchors: Tensor | None = None
    anchors_inside: Tensor | None = None
    logits: Tensor | None = None
    deltas: Tensor | None = None
    anchor_targets: AnchorTargets | None = None


class RegionProposalNetwork(RefuseAttributes, nn.Module):
    """The head and everything that is computed from its outputs.

    Args:
        in_channels: of every feature level.
        settings: of the detector.
        head: in place of `RPNHead`; gives what that gives.

    Raises:
        ValueError: the anchor generator has different numbers of anchors at its levels.
    """

    refused_attributes = RPN_ATTRIBUTES

    def __init__(self, in_channels: int, settings: Settings, head: nn.Module | None = None) -> None:
        super().__init__()
        self._settings = settings
        generator = settings.rpn_anchor_generator
        counts = generator.num_anchors_per_location()
        if len(set(counts)) != 1:
            raise ValueError(f"rpn_anchor_generator must have as many anchors at each level, got {counts}")
        self.logits_per_anchor = 2 if settings.rpn_objectness == "softmax" else 1
        hidden = settings.rpn_hidden_channels or in_channels
        if head is None:
            head = RPNHead(in_channels, hidden, counts[0], self.logits_per_anchor, settings.rpn_conv_depth)
        self.head = head
        self._cell_anchors = Constants(**{str(level): cell for level, cell in enumerate(generator.cell_anchors())})

    @property
    def settings(self) -> Settings:
        """Those of the detector, which sets them for all its parts."""
        return self._settings

    @property
    def cell_anchors(self) -> list[Tensor]:
        """For each level the anchors of its first cell, fp32 [A, 4], on the module's device."""
        return self._cell_anchors.on(next(self.parameters()).device)

    def forward(
        self,
        features: Sequence[Tensor],
        batch: Batch,
        targets: Targets | None = None,
        *,
        compute_losses: bool | None = None,
        compute_detections: bool | None = None,
        return_intermediates: bool = False,
    ) -> RPNOutput:
        """From features to proposals, and with targets to the losses; the head runs once, also for both.

        Args:
            features: for each level [B, C, H, W], in the dtype of the head, or that of autocast.
            batch: the images that the features are of; their padded size gives the strides.
            targets: ground truth, needed for the losses.
            compute_losses: give losses and the proposals of training; by default if there are targets.
            compute_detections: give the proposals of evaluation; by default if there are no targets.
            return_intermediates: give anchors, logits and deltas without losses too, and which anchors lie inside.

        Raises:
            ValueError: the levels are not those of the anchor generator, a level has no cells, the head's channels do
                not fit the anchors, or losses are to be computed without targets.
        """
        compute_losses = targets is not None if compute_losses is None else compute_losses
        compute_detections = targets is None if compute_detections is None else compute_detections
        if compute_losses:
            losses.require_targets(targets)
        logit_levels, delta_levels = map(narrow, self.head(features))
        self._check_channels(logit_levels, delta_levels)
        grids = [(level.shape[-2], level.shape[-1]) for level in logit_levels]
        strides = self.settings.rpn_anchor_generator.level_strides(batch.padded_size, grids)
        output = RPNOutput()
        if compute_losses or return_intermediates:
            cells = zip(self.cell_anchors, grids, strides, strict=True)
            anchors = torch.cat([anchor_boxes.grid_anchors(*level) for level in cells])
            logits = _flatten_levels(logit_levels, self.logits_per_anchor)
            deltas = _flatten_levels(delta_levels, 4)
            output = output._replace(anchors=anchors, logits=logits, deltas=deltas)
        if return_intermediates:
            output = output._replace(anchors_inside=anchor_boxes.inside(anchors, batch.sizes))
        if compute_losses:
            anchor_targets = self.assign_targets(anchors, batch.sizes, losses.require_targets(targets))
            rpn_losses = {
                "loss_objectness": losses.objectness(logits, anchor_targets),
                "loss_rpn_box_reg": losses.rpn_box(deltas, anchor_targets, self.settings.rpn_smooth_l1_beta),
            }
            proposals = self.generate_proposals(logit_levels, delta_levels, strides, batch, training=True)
            output = output._replace(losses=rpn_losses, anchor_targets=anchor_targets, training_proposals=proposals)
        if compute_detections:
            proposals = self.generate_proposals(logit_levels, delta_levels, strides, batch, training=False)
            output = output._replace(proposals=proposals)
        return output

    @torch.no_grad()
    def assign_targets(self, anchors: Tensor, sizes: Tensor, targets: Targets) -> AnchorTargets:
        """Label `anchors` [K, 4] by their IoU with the ground truth, sample those that are trained on, encode.

        Section 3.1.2: positive from `rpn_fg_iou_thresh` on, or the best of a ground-truth box; negative below
        `rpn_bg_iou_thresh`. `sizes` int64 [B, 2] is (height, width) of each image.
        """
        settings = self.settings
        matches = ops.match(
            anchors,
            targets.boxes,
            targets.valid,
            high=settings.rpn_fg_iou_thresh,
            low=settings.rpn_bg_iou_thresh,
            allow_low_quality=True,
            valid=anchor_boxes.inside(anchors, sizes) if settings.rpn_anchors_inside_only else None,
            **targets.ignored(settings.ignore_iof_thresh),
        )
        num_samples = settings.rpn_batch_size_per_image
        max_positive = int(num_samples * settings.rpn_positive_fraction)
        sampled = ops.sample(matches.label, num_samples, max_positive, targets.seeds)
        # Empty slots are written into one column beyond the anchors, which is cut off again.
        batch, count = matches.label.shape
        slot = torch.where(sampled.weight > 0, sampled.index, count)
        labels = torch.full((batch, count + 1), -1, dtype=torch.int64, device=anchors.device)
        labels = labels.scatter(1, slot, matches.label.gather(1, sampled.index))[:, :count]
        return AnchorTargets(labels, matches.deltas)

    @torch.no_grad()
    def generate_proposals(
        self,
        logit_levels: Sequence[Tensor],
        delta_levels: Sequence[Tensor],
        strides: Sequence[Size],
        batch: Batch,
        training: bool,
    ) -> Proposals:
        """Decode, clip, drop small boxes, take the top n of each level, suppress within it, take the top n of all.

        Args:
            logit_levels, delta_levels: as `RPNHead` gives them.
            strides: of each level (vertical, horizontal), in pixels.
            batch: its sizes clip the boxes, its scales turn original pixels into those of the resized image.
            training: by the hyperparameters of training or of evaluation.
        """
        settings = self.settings
        pre_nms = settings.rpn_pre_nms_top_n_train if training else settings.rpn_pre_nms_top_n_test
        post_nms = settings.rpn_post_nms_top_n_train if training else settings.rpn_post_nms_top_n_test
        original_pixels = settings.rpn_min_size_in_original_pixels
        min_side = settings.rpn_min_size * (batch.scales if original_pixels else torch.ones_like(batch.scales))
        boxes, scores = [], []
        for cell, logits, deltas, stride in zip(self.cell_anchors, logit_levels, delta_levels, strides, strict=True):
            decoded = ops.decode(
                deltas,
                logits,
                cell,
                batch.sizes,
                stride=stride,
                min_side=min_side if settings.rpn_min_size_before_top_n else None,
                clamp=settings.bbox_xform_clip,
            )
            top_scores, index = top_n(decoded.scores, pre_nms)
            scores.append(top_scores)
            boxes.append(_gather_boxes(decoded.boxes, index))
        # One group an image and level, levels padded to the longest.
        level_boxes = _stack_padded(boxes, 0.0)
        level_scores = _stack_padded(scores, -math.inf)
        valid = level_scores > -math.inf
        if settings.rpn_score_thresh > 0:
            valid &= level_scores.sigmoid() >= settings.rpn_score_thresh
        if not settings.rpn_min_size_before_top_n:
            valid &= box_algebra.are_as_large(level_boxes, min_side[:, None, None])
        batch_size, levels, length = level_scores.shape
        group_boxes, group_scores = level_boxes.flatten(0, 1), level_scores.flatten(0, 1)
        kept = ops.nms_padded(
            group_boxes,
            group_scores,
            settings.rpn_nms_thresh,
            min(post_nms, length),
            valid.flatten(0, 1),
            presorted=True,
        )
        best_scores = torch.where(kept.valid, group_scores.gather(1, kept.index), -math.inf)
        best_boxes = torch.where(kept.valid[..., None], _gather_boxes(group_boxes, kept.index), 0.0)
        best_scores = best_scores.unflatten(0, (batch_size, levels)).flatten(1, 2)
        best_boxes = best_boxes.unflatten(0, (batch_size, levels)).flatten(1, 2)
        if levels > 1:
            best_scores, index = top_n(best_scores, post_nms)
            best_boxes = _gather_boxes(best_boxes, index)
        return Proposals(best_boxes, best_scores, (best_scores > -math.inf).sum(1))

    def _check_channels(self, logit_levels: Sequence[Tensor], delta_levels: Sequence[Tensor]) -> None:
        """Raises ValueError if the channels of a head that was passed in do not fit the anchors."""
        counts = self.settings.rpn_anchor_generator.num_anchors_per_location()
        for name, levels, each in (("logits", logit_levels, self.logits_per_anchor), ("deltas", delta_levels, 4)):
            expected, found = [count * each for count in counts], [level.shape[1] for level in levels]
            if len(found) == len(expected) and found != expected:
                raise ValueError(
                    f"the RPN's head gives {found} channels of {name} at its levels, but {counts} anchors a cell need "
                    f"{expected}"
                )


def top_n(scores: Tensor, n: int) -> tuple[Tensor, ...]:
    """The `n` highest of each row of `scores` [B, K], or all if there are fewer: values and indices, best first."""
    n = min(n, scores.shape[1])
    if scores.is_cuda and scores.shape[1] < MULTI_BLOCK_TOPK:
        return tuple(part[:, :n] for part in scores.sort(dim=1, descending=True, stable=True))
    return tuple(scores.topk(n, dim=1))


def _gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [B, M] of `boxes` [B, N, 4]: [B, M, 4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def _flatten_levels(levels: Sequence[Tensor], values: int) -> Tensor:
    """[B, A * values, H, W] of each level to [B, K, values], in the order of the anchors."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, values) for level in levels], dim=1)


def _stack_padded(levels: Sequence[Tensor], fill: float) -> Tensor:
    """Tensors [B, n_level, ...] as one [B, levels, longest, ...], padded with `fill`."""
    longest = max(level.shape[1] for level in levels)
    padded = [
        torch.cat([level, level.new_full((level.shape[0], longest - level.shape[1], *level.shape[2:]), fill)], dim=1)
        for level in levels
    ]
    return torch.stack(padded, dim=1)
