"""The steps of torchvision's detectors between their layers, by fastdet's operations.

Each takes the module whose method it stands for, and that method's arguments, and gives what the method gives. What
fastdet's operations do not take goes to the method.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper, _filter_input, _setup_scales

from fastdet import boxes as box_algebra
from fastdet import ops
from fastdet.interop.instead import Instead, own

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
CACHED_GRIDS = 8
MIN_SIDE = 1e-2  # of a detection, in pixels: a constant in torchvision


class Anchors(Instead):
    """Remembers the grids of the last few image sizes; copies and pickles leave them behind."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        super().__init__(owner, name, function)
        self.grids: dict[tuple[Any, ...], tuple[list[Tensor], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "grids": {}}

    def __call__(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        levels = len(feature_maps) == len(self.owner.cell_anchors)
        # Tensors of other kinds (fake, traced, of a subclass) must not be met again by later calls.
        if not levels or type(first) is not Tensor or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().__call__(image_list, feature_maps)
        grids = [(level.shape[-2], level.shape[-1]) for level in feature_maps]
        height, width = image_list.tensors.shape[-2:]
        self.owner.set_cell_anchors(first.dtype, first.device)
        cells = self.owner.cell_anchors
        key = (height, width, first.dtype, first.device, *grids)
        known, anchors = self.grids.get(key, (None, first))
        if known is None or any(one is not other for one, other in zip(known, cells, strict=True)):
            strides = [(height // rows, width // columns) for rows, columns in grids]
            # What a later training step reads must not be an inference tensor.
            with torch.inference_mode(False):
                anchors = torch.cat(self.owner.grid_anchors(grids, strides))
            if len(self.grids) >= CACHED_GRIDS:
                self.grids.clear()
            self.grids[key] = (cells, anchors)
        return [anchors] * len(image_list.image_sizes)


def decode_single(coder: BoxCoder, rel_codes: Tensor, boxes: Tensor) -> Tensor:
    """Offsets [N, 4 * C] at `boxes` [N, 4] -> boxes [N, 4 * C]."""
    if rel_codes.dtype in HALVES:
        # torchvision computes in half precision here, fastdet would widen.
        return BoxCoder.decode_single(coder, rel_codes, boxes)
    boxes = boxes.to(rel_codes.dtype)
    if rel_codes.shape[1] == 4:
        return box_algebra.decode(rel_codes, boxes, coder.weights, coder.bbox_xform_clip)
    deltas = rel_codes.unflatten(1, (-1, 4))
    return box_algebra.decode(deltas, boxes[:, None], coder.weights, coder.bbox_xform_clip).flatten(1)


def filter_proposals(
    rpn: RegionProposalNetwork,
    proposals: Tensor,
    objectness: Tensor,
    image_shapes: list[tuple[int, int]],
    num_anchors_per_level: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The best of `proposals` [B, K, 4] by their logits `objectness` (B * K numbers): of each image [N, 4] and [N]."""
    if not _suppressible(proposals, objectness, rpn.nms_thresh):
        return RegionProposalNetwork.filter_proposals(rpn, proposals, objectness, image_shapes, num_anchors_per_level)
    batch, levels, device = len(proposals), len(num_anchors_per_level), proposals.device
    logits = objectness.detach().reshape(batch, -1).split(num_anchors_per_level, 1)
    tops = [of_level.topk(min(rpn.pre_nms_top_n(), of_level.shape[1]), dim=1) for of_level in logits]
    lengths = [top.indices.shape[1] for top in tops]
    # In one piece, as in torchvision: on a CPU the last bit of a sigmoid depends on where the number stands.
    probabilities = torch.cat([top.values for top in tops], dim=1).sigmoid().split(lengths, 1)
    # One group an image and level, levels padded to the longest.
    longest, offset = max(lengths), 0
    index = torch.zeros(batch, levels, longest, dtype=torch.int64, device=device)
    scores = objectness.new_zeros(batch, levels, longest)
    valid = torch.zeros(batch, levels, longest, dtype=torch.bool, device=device)
    for level, length in enumerate(lengths):
        index[:, level, :length] = tops[level].indices + offset
        scores[:, level, :length] = probabilities[level]
        valid[:, level, :length] = True
        offset += num_anchors_per_level[level]
    boxes = proposals.gather(1, _corners(index.flatten(1))).unflatten(1, (levels, longest))
    boxes = box_algebra.clip(boxes, _sizes(image_shapes, device)).to(proposals.dtype)
    width, height = box_algebra.sides(boxes)
    valid &= (width >= rpn.min_size) & (height >= rpn.min_size) & (scores >= rpn.score_thresh)

    most = rpn.post_nms_top_n()
    groups = boxes.flatten(0, 1), scores.flatten(0, 1)
    kept = ops.nms_padded(*groups, rpn.nms_thresh, min(most, longest), valid.flatten(0, 1))
    taken = torch.arange(kept.index.shape[1], device=device) < kept.count[:, None]
    # Free slots write into one column more than there are boxes, which is cut off again.
    chosen = torch.zeros(batch * levels, longest + 1, dtype=torch.bool, device=device)
    chosen.scatter_(1, torch.where(taken, kept.index, longest), True)
    chosen = chosen[:, :longest].reshape(batch, -1)
    candidates, found = torch.stack([valid.flatten(1).sum(1), chosen.sum(1)]).tolist()
    rows = chosen.nonzero()[:, 1].split(found)
    best = [_best(one, row, count, most) for one, row, count in zip(scores.flatten(1), rows, candidates, strict=True)]
    in_order = zip(boxes.flatten(1, 2), scores.flatten(1), best, strict=True)
    pairs = [(box[row], score[row]) for box, score, row in in_order]
    return [box for box, _ in pairs], [score for _, score in pairs]


def _best(scores: Tensor, rows: Tensor, candidates: int, most: int) -> Tensor:
    """The first of the `rows` by their `scores`.

    Where padding gives many boxes one score, their order decides which the sampler draws: so it is torchvision's, whose
    way of suppression, and with it the order of equals, depends on the number of candidates.
    """
    few = 4 * candidates <= (4_000 if scores.device.type == "cpu" else 100_000)
    return rows[scores[rows].sort(descending=True, stable=few).indices[:most]]


def assign_targets_to_anchors(
    rpn: RegionProposalNetwork, anchors: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each image the anchors' labels, fp32 [K] (1, 0, or -1 for neither), and their ground truth [K, 4]."""
    gt_boxes = [target["boxes"] for target in targets]
    matcher = rpn.proposal_matcher
    if other_rpn_matching(rpn) or not _matchable(matcher, anchors, gt_boxes):
        return RegionProposalNetwork.assign_targets_to_anchors(rpn, anchors, targets)
    truth, valid = _padded(gt_boxes)
    shared = all(one is anchors[0] for one in anchors)
    index, label = _match(matcher, anchors[0] if shared else pad_sequence(anchors, batch_first=True), truth, valid)
    labels, matched = label.float(), truth.gather(1, _corners(index))
    lengths = [len(one) for one in anchors]
    return _cut(labels, lengths), _cut(matched, lengths)


def assign_targets_to_proposals(
    heads: RoIHeads, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each image the index of every proposal's ground truth, and its label (0 background, -1 neither), int64 [N]."""
    matcher = heads.proposal_matcher
    labelled = [len(one) for one in gt_boxes] == [len(one) for one in gt_labels]
    if other_matcher(heads) or not (labelled and _matchable(matcher, proposals, gt_boxes)):
        return RoIHeads.assign_targets_to_proposals(heads, proposals, gt_boxes, gt_labels)
    truth, valid = _padded(gt_boxes)
    classes = pad_sequence(gt_labels, batch_first=True).long()
    classes = F.pad(classes, (0, truth.shape[1] - classes.shape[1]))
    index, label = _match(matcher, pad_sequence(proposals, batch_first=True), truth, valid)
    labels = torch.where(label == 1, classes.gather(1, index), label)
    lengths = [len(one) for one in proposals]
    return _cut(index, lengths), _cut(labels, lengths)


def pool(
    pool: MultiScaleRoIAlign, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
) -> Tensor:
    """Features of all `boxes` ([N, 4] of each image), [sum of N, C, height, width]."""
    levels = _filter_input(x, pool.featmap_names)
    if pool.scales is None or pool.map_levels is None:
        pool.scales, pool.map_levels = _setup_scales(levels, image_shapes, pool.canonical_scale, pool.canonical_level)
    scale, level = pool.map_levels.s0, pool.map_levels.lvl0
    lowest, highest = (-int(math.log2(end)) for end in (pool.scales[0], pool.scales[-1]))
    if vars(pool.map_levels) == vars(LevelMapper(lowest, highest, scale, level)):
        try:
            return ops.multiscale_roi_align(
                levels, boxes, pool.output_size, pool.scales, pool.sampling_ratio, False, scale, level
            )
        except (TypeError, ValueError):
            # Refused at the door: levels of several dtypes, or scales that do not fall by halves. torchvision may know.
            pass
    return MultiScaleRoIAlign.forward(pool, x, boxes, image_shapes)


def postprocess_detections(
    heads: RoIHeads,
    class_logits: Tensor,
    box_regression: Tensor,
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each image boxes [N, 4], scores [N] and labels int64 [N], best first."""
    classes = class_logits.shape[1]
    fits = _suppressible(box_regression, class_logits, heads.nms_thresh) and box_regression.shape[1] == 4 * classes
    if other_coder(heads) or not fits:
        return RoIHeads.postprocess_detections(heads, class_logits, box_regression, proposals, image_shapes)
    device = class_logits.device
    # Only what scores enough is decoded: of a thousand boxes for each class some hundreds.
    every_score = F.softmax(class_logits, -1)
    row, label = torch.where(every_score[:, 1:] > heads.score_thresh)
    label = label + 1
    counts = torch.tensor([len(one) for one in proposals], device=device)
    images = torch.arange(len(proposals), device=device)
    image = images.repeat_interleave(counts, output_size=len(class_logits))[row]
    scores = every_score[row, label]
    deltas = box_regression.unflatten(1, (classes, 4))[row, label]
    boxes = heads.box_coder.decode_single(deltas, torch.cat(proposals)[row])
    boxes = box_algebra.clip(boxes, _sizes(image_shapes, device)[image]).to(boxes.dtype)
    width, height = box_algebra.sides(boxes)
    large = torch.where((width >= MIN_SIDE) & (height >= MIN_SIDE))[0]
    boxes, scores, label, image = boxes[large], scores[large], label[large], image[large]

    # On a CPU many small groups are faster one image at a time, by torchvision's operator.
    suppress = _suppress_by_image if device.type == "cpu" else _suppress_together
    found = suppress(boxes, scores, label, image, classes, len(proposals), heads.nms_thresh)
    found = [rows[: heads.detections_per_img] for rows in found]
    return [boxes[rows] for rows in found], [scores[rows] for rows in found], [label[rows] for rows in found]


def _suppress_by_image(
    boxes: Tensor, scores: Tensor, label: Tensor, image: Tensor, classes: int, batch: int, threshold: float
) -> list[Tensor]:
    """The rows kept in each image, best first. `image` ascends."""
    rows = torch.arange(len(boxes), device=boxes.device).split(image.bincount(minlength=batch).tolist())
    return [mine[box_ops.batched_nms(boxes[mine], scores[mine], label[mine], threshold)] for mine in rows]


def _suppress_together(
    boxes: Tensor, scores: Tensor, label: Tensor, image: Tensor, classes: int, batch: int, threshold: float
) -> list[Tensor]:
    """The same in one call for all images and classes."""
    order = scores.argsort(descending=True, stable=True)
    group = (image * classes + label)[order]
    by_group = group.argsort(stable=True)
    sizes = group.bincount(minlength=batch * classes)
    longest = int(sizes.max())
    slot = torch.arange(longest, device=boxes.device)
    valid = slot < sizes[:, None]
    rank = by_group[torch.where(valid, (sizes.cumsum(0) - sizes)[:, None] + slot, 0)]
    kept = ops.nms_padded(boxes[order][rank], scores[order][rank], threshold, longest, valid, presorted=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[rank.gather(1, kept.index)[slot < kept.count[:, None]]] = True
    rows = order[chosen]
    of_image = image[rows].argsort(stable=True)
    return list(rows[of_image].split(image[rows].bincount(minlength=batch).tolist()))


def _suppressible(boxes: Tensor, scores: Tensor, threshold: float) -> bool:
    """Whether fastdet's suppression takes them."""
    return boxes.dtype in FLOATS and scores.dtype in FLOATS and 0 <= threshold <= 1


def _matchable(matcher: Matcher, candidates: list[Tensor], gt_boxes: list[Tensor]) -> bool:
    """Whether fastdet's matching takes them; an image without any candidate is torchvision's to refuse."""
    known = all(boxes.dtype in FLOATS for boxes in (*candidates, *gt_boxes))
    known &= len({boxes.dtype for boxes in gt_boxes}) == 1
    return known and 0 <= matcher.low_threshold <= matcher.high_threshold <= 1 and all(map(len, candidates))


def _match(matcher: Matcher, candidates: Tensor, truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Index and label int64 [B, K], as torchvision has them: index 0 of what is not positive, all 0 without truth."""
    found = ops.match(
        candidates.float(),
        truth.float(),
        valid,
        high=matcher.high_threshold,
        low=matcher.low_threshold,
        allow_low_quality=matcher.allow_low_quality_matches,
    )
    label = torch.where(valid.any(1, keepdim=True), found.label, 0)
    return torch.where(label == 1, found.index, 0), label


def _padded(gt_boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, G, 4] and which of them count, bool [B, G]; one row at least, so that there is something to gather."""
    counts = [len(boxes) for boxes in gt_boxes]
    truth = pad_sequence([boxes.reshape(-1, 4) for boxes in gt_boxes], batch_first=True)
    truth = F.pad(truth, (0, 0, 0, int(max(counts) == 0)))
    slot = torch.arange(truth.shape[1], device=truth.device)
    return truth, slot < torch.tensor(counts, device=truth.device)[:, None]


def _corners(index: Tensor) -> Tensor:
    """`index` [B, N] for a gather of rows of boxes: [B, N, 4]."""
    return index[..., None].expand(-1, -1, 4)


def _cut(padded: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]


def _sizes(image_shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.tensor([tuple(shape) for shape in image_shapes], device=device)


def other_matcher(owner: Any) -> str | None:
    return own(owner.proposal_matcher, Matcher, "__call__", "set_low_quality_matches_")


def other_rpn_matching(owner: Any) -> str | None:
    if owner.box_similarity is not box_ops.box_iou:
        return "its box_similarity is not torchvision's box_iou"
    return other_matcher(owner)


def other_coder(owner: Any) -> str | None:
    return own(owner.box_coder, BoxCoder, "decode", "decode_single")
