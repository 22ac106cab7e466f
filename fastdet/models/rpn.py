"""The region proposal network: anchors, their scores and offsets, proposals, and what the anchors should have said.

Ren et al. 2015 (arXiv:1506.01497), section 3. Every step works on the whole batch, in shapes that depend on the
settings and the padded image size alone.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastdet import boxes as box_algebra
from fastdet import ops
from fastdet.models import anchors as anchor_boxes
from fastdet.models import losses
from fastdet.models.anchors import Size
from fastdet.models.padding import stride_of
from fastdet.models.settings import Settings, refuse
from fastdet.structures import AnchorTargets, HeadOutput, Proposals, Targets


class RPNHead(nn.Module):
    """3x3 convolutions, one as a rule, and two 1x1 ones over every level; the names of torchvision's head."""

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
            start_normal(layer, std=0.01)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The names that torchvision's head had before version 0.13, and its older files have still.
        for kind in ("weight", "bias"):
            former = f"{prefix}conv.{kind}"
            if former in state_dict:
                state_dict[f"{prefix}conv.0.0.{kind}"] = state_dict.pop(former)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: list[Tensor]) -> HeadOutput:
        hidden = [self.conv(level) for level in features]
        return HeadOutput([self.cls_logits(level) for level in hidden], [self.bbox_pred(level) for level in hidden])


# torchvision's attributes that are settings here: assigned, they would change nothing.
_SETTINGS = {
    "anchor_generator": "rpn_anchor_generator",
    "nms_thresh": "rpn_nms_thresh",
    "score_thresh": "rpn_score_thresh",
    "min_size": "rpn_min_size",
    "_pre_nms_top_n": "rpn_pre_nms_top_n_test",
    "_post_nms_top_n": "rpn_post_nms_top_n_test",
}


class RegionProposalNetwork(nn.Module):
    """The head and everything that is computed from its outputs."""

    def __init__(self, in_channels: int, settings: Settings, head: nn.Module | None = None) -> None:
        super().__init__()
        self.settings = settings
        generator = settings.rpn_anchor_generator
        counts = generator.num_anchors_per_location()
        if len(set(counts)) != 1:
            raise ValueError(f"rpn_anchor_generator must have as many anchors at each level, got {counts}")
        self.logits_per_anchor = 2 if settings.rpn_objectness == "softmax" else 1
        hidden = settings.rpn_hidden_channels or in_channels
        if head is None:
            head = RPNHead(in_channels, hidden, counts[0], self.logits_per_anchor, settings.rpn_conv_depth)
        self.head = head
        for level, cell in enumerate(generator.cell_anchors()):
            self.register_buffer(f"_cell_anchors{level}", cell, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(name, _SETTINGS)
        super().__setattr__(name, value)

    @property
    def cell_anchors(self) -> list[Tensor]:
        """For each level fp32 [A, 4] on the module's device."""
        return [getattr(self, f"_cell_anchors{i}") for i in range(len(self.settings.rpn_anchor_generator.sizes))]

    def forward(self, features: list[Tensor]) -> HeadOutput:
        output = HeadOutput(*self.head(features))
        self._check(output)
        return output

    def _check(self, output: HeadOutput) -> None:
        """Raises ValueError if a head that was given does not fit the anchors."""
        counts = self.settings.rpn_anchor_generator.num_anchors_per_location()
        for name, levels, each in (("logits", output.logits, self.logits_per_anchor), ("deltas", output.deltas, 4)):
            expected, given = [count * each for count in counts], [level.shape[1] for level in levels]
            if len(given) == len(expected) and given != expected:
                raise ValueError(
                    f"the RPN's head gives {given} channels of {name} at its levels, but {counts} anchors a cell need "
                    f"{expected}"
                )

    def strides(self, output: HeadOutput, image_size: Size) -> list[Size]:
        grids = [(level.shape[-2], level.shape[-1]) for level in output.logits]
        generator = self.settings.rpn_anchor_generator
        strides = generator.level_strides(image_size, grids)
        if generator.strides is None and self.settings.mask_padding:
            # The quotient of the padded sides would depend on the largest image of the batch.
            return [(stride_of(image_size[0], grid[0]), stride_of(image_size[1], grid[1])) for grid in grids]
        return strides

    def anchors(self, output: HeadOutput, image_size: Size) -> Tensor:
        """All anchors, level after level, fp32 [K, 4]."""
        strides = self.strides(output, image_size)
        levels = [
            anchor_boxes.grid_anchors(cell, (logits.shape[-2], logits.shape[-1]), stride)
            for cell, logits, stride in zip(self.cell_anchors, output.logits, strides, strict=True)
        ]
        return torch.cat(levels)

    def trainable_anchors(self, anchors: Tensor, sizes: Tensor, cells: list[Tensor] | None = None) -> Tensor:
        """bool [B, K]: the anchors that may get a label; `cells` as in `propose`."""
        if self.settings.rpn_anchors_inside_only:
            trainable = anchor_boxes.inside(anchors, sizes)
        else:
            trainable = torch.ones(len(sizes), len(anchors), dtype=torch.bool, device=anchors.device)
        if cells is not None:
            counts = self.settings.rpn_anchor_generator.num_anchors_per_location()
            trainable &= torch.cat([_per_anchor(*level) for level in zip(cells, counts, strict=True)], dim=1)
        return trainable

    def flatten(self, output: HeadOutput) -> tuple[Tensor, Tensor]:
        """Logits [B, K, L] and offsets [B, K, 4] in the anchors' order."""
        return _by_anchor(output.logits, self.logits_per_anchor), _by_anchor(output.deltas, 4)

    @torch.no_grad()
    def assign(
        self, anchors: Tensor, sizes: Tensor, targets: Targets, cells: list[Tensor] | None = None
    ) -> AnchorTargets:
        """Label the anchors by their overlap with the ground truth and sample those that train.

        `cells` as in `propose`.
        """
        settings = self.settings
        trainable = self.trainable_anchors(anchors, sizes, cells)
        matches = ops.match(
            anchors,
            targets.boxes,
            targets.valid,
            high=settings.rpn_fg_iou_thresh,
            low=settings.rpn_bg_iou_thresh,
            allow_low_quality=True,
            valid=trainable,
            **targets.ignored(settings.ignore_iof_thresh),
        )
        num_samples = settings.rpn_batch_size_per_image
        sampled = ops.sample(matches.label, num_samples, int(num_samples * settings.rpn_positive_fraction))
        # Free slots write into one column more than there are anchors, which is cut off again.
        batch, count = matches.label.shape
        slot = torch.where(sampled.weight > 0, sampled.index, count)
        labels = torch.full((batch, count + 1), -1, dtype=torch.int64, device=anchors.device)
        labels = labels.scatter(1, slot, matches.label.gather(1, sampled.index))[:, :count]
        return AnchorTargets(labels, matches.deltas)

    @torch.no_grad()
    def propose(
        self,
        output: HeadOutput,
        sizes: Tensor,
        scales: Tensor,
        image_size: Size,
        training: bool,
        cells: list[Tensor] | None = None,
    ) -> Proposals:
        """The best boxes after suppression, with the numbers of training or of evaluation.

        `cells`: for each level bool [B, H, W], the cells whose anchors count; None: all.
        """
        settings = self.settings
        pre_nms = settings.rpn_pre_nms_top_n_train if training else settings.rpn_pre_nms_top_n_test
        post_nms = settings.rpn_post_nms_top_n_train if training else settings.rpn_post_nms_top_n_test
        original_pixels = settings.rpn_min_size_in_original_pixels
        min_side = settings.rpn_min_size * (scales if original_pixels else torch.ones_like(scales))
        boxes, scores = [], []
        for k, (cell, logits, deltas, stride) in enumerate(
            zip(self.cell_anchors, output.logits, output.deltas, self.strides(output, image_size), strict=True)
        ):
            decoded = ops.decode(
                deltas,
                logits,
                cell,
                sizes,
                stride=stride,
                min_side=min_side if settings.rpn_min_size_before_top_n else None,
                clamp=settings.bbox_xform_clip,
            )
            score = decoded.scores
            if cells is not None:
                score = score.masked_fill(~_per_anchor(cells[k], len(cell)), -math.inf)
            top = score.topk(min(pre_nms, score.shape[1]), dim=1)
            scores.append(top.values)
            boxes.append(decoded.boxes.gather(1, top.indices[..., None].expand(-1, -1, 4)))
        # One group an image and level, levels padded to the longest.
        level_boxes = _stack_padded(boxes, 0.0)
        level_scores = _stack_padded(scores, -math.inf)
        valid = level_scores > -math.inf
        if settings.rpn_score_thresh > 0:
            valid &= level_scores.sigmoid() >= settings.rpn_score_thresh
        if not settings.rpn_min_size_before_top_n:
            width, height = box_algebra.sides(level_boxes)
            valid &= torch.minimum(width, height) >= min_side[:, None, None]
        batch, levels, length = level_scores.shape
        kept = ops.nms_padded(
            level_boxes.flatten(0, 1),
            level_scores.flatten(0, 1),
            settings.rpn_nms_thresh,
            min(post_nms, length),
            valid.flatten(0, 1),
            presorted=True,
        )
        taken = torch.arange(kept.index.shape[1], device=sizes.device) < kept.count[:, None]
        best_boxes = level_boxes.flatten(0, 1).gather(1, kept.index[..., None].expand(-1, -1, 4))
        best_scores = torch.where(taken, level_scores.flatten(0, 1).gather(1, kept.index), -math.inf)
        best_boxes = torch.where(taken[..., None], best_boxes, 0.0).unflatten(0, (batch, levels)).flatten(1, 2)
        best_scores = best_scores.unflatten(0, (batch, levels)).flatten(1, 2)
        if levels > 1:
            top = best_scores.topk(min(post_nms, best_scores.shape[1]), dim=1)
            best_scores, best_boxes = top.values, best_boxes.gather(1, top.indices[..., None].expand(-1, -1, 4))
        return Proposals(best_boxes, best_scores, (best_scores > -math.inf).sum(1))

    def losses(self, logits: Tensor, locs: Tensor, targets: AnchorTargets) -> dict[str, Tensor]:
        """`logits` [B, K, L] and `locs` [B, K, 4], as `flatten` gives them."""
        return {
            "loss_objectness": losses.objectness(logits, targets),
            "loss_rpn_box_reg": losses.rpn_box(locs, targets, self.settings.rpn_smooth_l1_beta),
        }


def start_normal(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Draw the weights from N(0, std) and set the biases to 0, as the paper does for new layers."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _by_anchor(levels: list[Tensor], values: int) -> Tensor:
    """[B, A * values, H, W] of each level to [B, all anchors, values]."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, values) for level in levels], dim=1)


def _per_anchor(cells: Tensor, num_anchors: int) -> Tensor:
    """bool [B, H, W] of cells as [B, H * W * A] of their anchors."""
    return cells[..., None].expand(*cells.shape, num_anchors).flatten(1)


def _stack_padded(levels: list[Tensor], fill: float) -> Tensor:
    """Tensors [B, n_level, ...] as one [B, levels, longest, ...], the rest filled."""
    longest = max(level.shape[1] for level in levels)
    padded = [
        torch.cat([level, level.new_full((level.shape[0], longest - level.shape[1], *level.shape[2:]), fill)], dim=1)
        for level in levels
    ]
    return torch.stack(padded, dim=1)
