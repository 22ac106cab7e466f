"""The parts of torchvision's detectors with fastdet's operations: the subclasses that `accelerate` gives them.

Each method takes and returns what torchvision's does, and calls it for what fastdet's operations do not take.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import box_iou

from fastdet import boxes as box_algebra
from fastdet import ops

# torchvision defines these two in a private module, and names them in its public classes.
_TYPES = get_type_hints(RegionProposalNetwork)
BoxCoder, Matcher = _TYPES["box_coder"], _TYPES["proposal_matcher"]

Sizes = list[tuple[int, int]]  # (height, width) of each image
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_LEVELS = 5  # of ops.multiscale_roi_align


class _Unscripted:
    def __prepare_scriptable__(self) -> None:
        """Called by torch.jit.script, of the whole model too."""
        raise RuntimeError("torch.jit.script can't compile an accelerated model: undo the acceleration before")


class AcceleratedRegionProposalNetwork(_Unscripted, RegionProposalNetwork):
    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: Sizes, num_anchors_per_level: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best of `proposals` [B, K, 4] by their logits `objectness` [B * K, 1]: of each image [N, 4] and [N]."""
        if not _supported(proposals, objectness) or not 0 <= self.nms_thresh <= 1:
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        batch, most = len(proposals), self.post_nms_top_n()
        logits = objectness.detach().reshape(batch, -1).split(num_anchors_per_level, 1)
        tops = [level.topk(min(self.pre_nms_top_n(), level.shape[1]), dim=1) for level in logits]
        # In one piece, as in torchvision: on a CPU the last bit of a sigmoid depends on the position of its input.
        probabilities = torch.cat([top.values for top in tops], dim=1).sigmoid()
        # One group for each image and level, levels padded to the longest. NaN is below every threshold.
        scores = _pad_levels(probabilities.split([top.values.shape[1] for top in tops], 1), math.nan)
        starts = accumulate(num_anchors_per_level[:-1], initial=0)
        index = _pad_levels([top.indices + start for top, start in zip(tops, starts, strict=True)], 0)
        boxes = proposals[torch.arange(batch, device=proposals.device)[:, None, None], index]
        boxes = box_algebra.clip(boxes, torch.tensor(image_shapes, device=boxes.device)).to(boxes.dtype)
        valid = box_algebra.are_as_large(boxes, self.min_size) & (scores >= self.score_thresh)

        boxes, scores, valid = (each.flatten(0, 1) for each in (boxes, scores, valid))
        kept = ops.nms_padded(boxes, scores, self.nms_thresh, min(most, scores.shape[1]), valid)
        first_row = scores.shape[1] * torch.arange(len(scores), device=scores.device)
        rows = (first_row[:, None] + kept.index)[kept.valid].sort().values
        counts = torch.stack([valid.sum(1), kept.count]).unflatten(1, (batch, -1)).sum(2)
        best = _best(scores.flatten(), rows, most, *counts.tolist())
        return [boxes.flatten(0, 1)[row] for row in best], [scores.flatten()[row] for row in best]

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each image the anchors' labels, fp32 [K] (1, 0, or -1 for neither), and their ground truth [K, 4]."""
        gt_boxes = [target["boxes"] for target in targets]
        found = None if difference(self.box_similarity, box_iou) else _match(self.proposal_matcher, anchors, gt_boxes)
        if found is None:
            return super().assign_targets_to_anchors(anchors, targets)
        index, label, gt = found
        matched = gt[torch.arange(len(gt), device=gt.device)[:, None], index]
        return _unpad(label.float(), anchors), _unpad(matched, anchors)


class AcceleratedRoIHeads(_Unscripted, RoIHeads):
    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each image the index of each proposal's ground truth and its label (0 background, -1 neither), [N]."""
        labeled = [len(boxes) for boxes in gt_boxes] == [len(labels) for labels in gt_labels]
        found = _match(self.proposal_matcher, proposals, gt_boxes) if labeled else None
        if found is None:
            return super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        index, label, _ = found
        classes = F.pad(pad_sequence(gt_labels, batch_first=True).long(), (0, 1))
        labels = torch.where(label == 1, classes.gather(1, index), label)
        return _unpad(index, proposals), _unpad(labels, proposals)

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each image boxes [N, 4], scores [N] and labels int64 [N], best first."""
        num_classes, batch, device = class_logits.shape[1], len(proposals), class_logits.device
        supported = _supported(class_logits, box_regression) and 0 <= self.nms_thresh <= 1
        if not supported or box_regression.shape[1] != 4 * num_classes or difference(self.box_coder, BoxCoder):
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        # Only what is above the threshold is decoded: of a thousand boxes for each class some hundreds.
        probabilities = F.softmax(class_logits, -1)[:, 1:]
        row, label = torch.where(probabilities > self.score_thresh)
        counts = torch.tensor([len(boxes) for boxes in proposals], device=device)
        image = torch.arange(batch, device=device).repeat_interleave(counts, output_size=len(class_logits))[row]
        deltas = box_regression.unflatten(1, (num_classes, 4))[row, label + 1]
        boxes = self.box_coder.decode_single(deltas, torch.cat(proposals)[row])
        boxes = box_algebra.clip(boxes, torch.tensor(image_shapes, device=device)[image]).to(boxes.dtype)
        large = torch.where(box_algebra.are_as_large(boxes, 1e-2))[0]  # a constant in torchvision
        boxes, scores, label, image = boxes[large], probabilities[row, label][large], label[large], image[large]

        kept = _suppress(boxes, scores, image * num_classes + label, batch * num_classes, self.nms_thresh)
        num_candidates, num_kept = (each.bincount(minlength=batch).tolist() for each in (image, image[kept]))
        best = _best(scores, kept, self.detections_per_img, num_candidates, num_kept)
        return [boxes[row] for row in best], [scores[row] for row in best], [label[row] + 1 for row in best]


class AcceleratedMultiScaleRoIAlign(_Unscripted, MultiScaleRoIAlign):
    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        """Features of all `boxes` ([N, 4] of each image), [sum of N, C, height, width]."""
        levels = [features for name, features in x.items() if name in self.featmap_names]
        dtype = levels[0].dtype
        levels_fit = len(levels) <= MAX_LEVELS and all(level.dtype == dtype for level in levels)
        boxes_fit = len(boxes) == len(levels[0]) and all(each.dtype in (dtype, torch.float32) for each in boxes)
        if not (_supported(*levels) and levels_fit and boxes_fit):
            return super().forward(x, boxes, image_shapes)
        if self.scales is None or self.map_levels is None:
            # torchvision infers both at the first call, here one of no boxes, and keeps them.
            super().forward(x, [each[:0] for each in boxes], image_shapes)
        mapper = self.map_levels
        # Scales that fall by halves to the mapper's coarsest level, which may repeat.
        pyramid = [2.0 ** -min(mapper.k_min + number, mapper.k_max) for number in range(len(levels))]
        if [*pyramid, mapper.eps] != [*self.scales, 1e-6] or pyramid[-1] != 2.0**-mapper.k_max:
            return super().forward(x, boxes, image_shapes)
        size, ratio = self.output_size, self.sampling_ratio
        return ops.multiscale_roi_align(levels, boxes, size, pyramid, ratio, False, mapper.s0, mapper.lvl0)


ACCELERATED: dict[type, type] = {
    RegionProposalNetwork: AcceleratedRegionProposalNetwork,
    RoIHeads: AcceleratedRoIHeads,
    MultiScaleRoIAlign: AcceleratedMultiScaleRoIAlign,
}

# The parts with a subclass above, and those whose work the subclasses do, if they are torchvision's.
PARTS: dict[str, Any] = {
    "rpn": RegionProposalNetwork,
    "rpn.box_similarity": box_iou,
    "rpn.proposal_matcher": Matcher,
    "roi_heads": RoIHeads,
    "roi_heads.box_coder": BoxCoder,
    "roi_heads.proposal_matcher": Matcher,
    "roi_heads.box_roi_pool": MultiScaleRoIAlign,
    "roi_heads.mask_roi_pool": MultiScaleRoIAlign,
    "roi_heads.keypoint_roi_pool": MultiScaleRoIAlign,
}


def difference(part: Any, origin: Any) -> str | None:
    """How `part` may differ from torchvision's `origin`, a function, or a class of which it is an instance."""
    if part is not origin and type(part) not in (origin, ACCELERATED.get(origin)):
        return f"{getattr(part, '__name__', type(part).__name__)} is not torchvision's {origin.__name__}"
    changed = [name for name in vars(part) if callable(getattr(origin, name, None))]
    return f"{', '.join(changed)} was set on the instance" if changed else None


def _supported(*tensors: Tensor) -> bool:
    """Whether fastdet's operations take their dtypes. A trace must hold no operator of fastdet's."""
    return not torch.jit.is_tracing() and all(tensor.dtype in FLOATS for tensor in tensors)


def _pad_levels(levels: Sequence[Tensor], value: float) -> Tensor:
    """[B, K_l] of each level -> [B, L, largest K_l], padded with `value`."""
    return pad_sequence([level.T for level in levels], batch_first=True, padding_value=value).permute(2, 0, 1)


def _suppress(boxes: Tensor, scores: Tensor, group: Tensor, num_groups: int, threshold: float) -> Tensor:
    """The rows that suppression within each group keeps, ascending: one call, of groups padded to the largest."""
    order = scores.argsort(descending=True, stable=True)
    by_group = group[order].argsort(stable=True)
    sizes = group.bincount(minlength=num_groups)
    slot = torch.arange(int(sizes.max()), device=boxes.device)
    valid = slot < sizes[:, None]
    rank = by_group[torch.where(valid, (sizes.cumsum(0) - sizes)[:, None] + slot, 0)]
    kept = ops.nms_padded(boxes[order][rank], scores[order][rank], threshold, len(slot), valid, presorted=True)
    return order[rank.gather(1, kept.index)[kept.valid]].sort().values


def _best(scores: Tensor, rows: Tensor, most: int, num_candidates: list[int], num_kept: list[int]) -> list[Tensor]:
    """Of each image the first `most` of its `num_kept` rows, best first."""
    best = []
    for row, candidates in zip(rows.split(num_kept), num_candidates, strict=True):
        # The order of equal scores decides what the sampler draws: as torchvision ranks so many candidates.
        stable = 4 * candidates <= (4_000 if scores.device.type == "cpu" else 100_000)
        best.append(row[scores[row].sort(descending=True, stable=stable).indices[:most]])
    return best


def _match(matcher: Any, candidates: list[Tensor], gt_boxes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Index of the ground truth (0 where not positive) and label of each candidate, int64 [B, K], and the padded ground
    truth [B, G + 1, 4]. None where fastdet's matching differs; an image without candidates is torchvision's to refuse.
    """
    one_dtype = len({boxes.dtype for boxes in gt_boxes}) == 1
    if difference(matcher, Matcher) or not (one_dtype and _supported(*candidates, *gt_boxes)):
        return None
    low, high = matcher.low_threshold, matcher.high_threshold
    if not (0 <= low <= high <= 1 and all(map(len, candidates))):
        return None
    gt = F.pad(pad_sequence([boxes.reshape(-1, 4) for boxes in gt_boxes], batch_first=True), (0, 0, 0, 1))
    counts = torch.tensor([len(boxes) for boxes in gt_boxes], device=gt.device)[:, None]
    found = ops.match(
        pad_sequence(candidates, batch_first=True).float(),
        gt.float(),
        torch.arange(gt.shape[1], device=gt.device) < counts,
        high=high,
        low=low,
        allow_low_quality=matcher.allow_low_quality_matches,
    )
    # Without ground truth all is background in torchvision, under any thresholds.
    label = torch.where(counts > 0, found.label, 0)
    return torch.where(label == 1, found.index, 0), label, gt


def _unpad(padded: Tensor, candidates: list[Tensor]) -> list[Tensor]:
    return [row[: len(boxes)] for row, boxes in zip(padded, candidates, strict=True)]
