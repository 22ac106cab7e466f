"""Greedy non-maximum suppression: exact, batched over groups, in fixed shapes, and with torchvision's signature.

The reference is `torchvision.ops.nms` on the CPU, index for index: it compares an fp32 IoU with a float64 threshold.
An fp32 number exceeds a float64 threshold exactly if it exceeds that threshold rounded down to fp32, so one rounding on
the host makes every fp32 comparison decide alike.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, float32
from torch.overrides import handle_torch_function

from fastdet.ops import _checks
from fastdet.ops._groups import padded_groups
from fastdet.ops._library import define, find_proxies, uncompiled
from fastdet.ops.cpu import nms as cpu


class Kept(NamedTuple):
    """`index` int64 [groups, max_keep], padded with 0; `count` int64 [groups]."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    count: Tensor  # type: ignore[assignment]  # hides tuple.count

    @property
    def valid(self) -> Tensor:
        """bool [groups, max_keep]: the rows that are not padding."""
        return torch.arange(self.index.shape[1], device=self.count.device) < self.count[:, None]


def nms_cuda(
    boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import nms

    return _suppress_by(nms, boxes, valid, iou_threshold, max_keep, scores)


def nms_cuda_cooperative(
    boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`nms_cuda` in one launch whose programs wait for each other: not registered, as it was never run on a GPU."""
    from fastdet.kernels import nms_cooperative

    return _suppress_by(nms_cooperative, boxes, valid, iou_threshold, max_keep, scores)


def _suppress_by(
    kernel: ModuleType, boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups, num_boxes, _ = boxes.shape
    if not groups or not num_boxes or not max_keep:
        return boxes.new_zeros(groups, max_keep, dtype=torch.int64), boxes.new_zeros(groups, dtype=torch.int64)
    if scores is not None:
        # Rows that are not valid go last, so that the work ends with those that are.
        order = torch.where(valid, scores, -math.inf).argsort(dim=1, descending=True, stable=True)
        boxes, valid = boxes.gather(1, order[..., None].expand(-1, -1, 4)), valid.gather(1, order)
    config = kernel.config(groups, num_boxes, max_keep)
    index = boxes.new_empty(groups, max_keep, dtype=torch.int64)
    count = boxes.new_empty(groups, dtype=torch.int64)
    kernel.launch(
        boxes.contiguous(),
        valid.contiguous(),
        survivors=boxes.new_empty(groups, config.settled, dtype=torch.int32),
        overlap=boxes.new_empty(groups, config.settled // 32, config.settled, dtype=torch.int32),
        removed=boxes.new_empty(groups, config.step, dtype=torch.int8),
        state=boxes.new_zeros(kernel.STATE_ROWS, groups, dtype=torch.int32),
        kept=boxes.new_empty(groups, max_keep, 4),
        index=index,
        count=count,
        iou_threshold=cpu.round_threshold_down(iou_threshold),
        config=config,
    )
    if scores is not None:
        index = torch.where(Kept(index, count).valid, order.gather(1, index), 0)
    return index, count


def nms_fake(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, *_: object) -> tuple[Tensor, Tensor]:
    groups = boxes.shape[0]
    return boxes.new_empty(groups, max_keep, dtype=torch.int64), boxes.new_empty(groups, dtype=torch.int64)


define(
    # Without `scores` the rows are in descending order of priority.
    "nms(Tensor boxes, Tensor valid, float iou_threshold, SymInt max_keep, Tensor? scores=None) -> (Tensor, Tensor)",
    cpu=cpu.nms_cpu,
    cuda=nms_cuda,
    fake=nms_fake,
)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    valid: Tensor | None = None,
    presorted: bool = False,
) -> Kept:
    """Suppress within each group of a padded batch, in fixed shapes and without a host sync, as a model needs it.

    Args:
        boxes: fp32 [groups, N, 4], x1, y1, x2, y2 in pixels.
        scores: [groups, N]; equal scores rank by lower index.
        iou_threshold: in [0, 1]; a box is removed if its IoU with a kept one is above.
        max_keep: boxes kept at most in a group, the highest ranked.
        valid: bool [groups, N]; False rows neither suppress nor are kept.
        presorted: the rows stand in descending order of their scores already.

    Returns:
        Kept: positions in the rows as given, in descending order of score, [groups, max_keep] padded with 0.

    Raises:
        TypeError, ValueError: an argument of another type, shape, range or device; the message names it.
    """
    boxes = _checks.boxes("boxes", boxes, ndim=3).detach()
    scores = _checks.tensor("scores", _checks.floats("scores", scores), tuple(boxes.shape[:2])).detach()
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    _checks.tensor("valid", valid, tuple(boxes.shape[:2]), torch.bool)
    _checks.same_device(boxes=boxes, scores=scores, valid=valid)
    _checks.threshold("iou_threshold", iou_threshold)
    _checks.integer("max_keep", max_keep, least=0)
    sorted_by = None if _checks.flag("presorted", presorted) else scores
    return Kept(*torch.ops.fastdet.nms(boxes, valid, iou_threshold, max_keep, sorted_by))


def _nms_indices(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int | None) -> Tensor:
    """`nms` of arguments that are checked: boxes and scores of one dtype, fp32 or float64."""
    if not _is_implemented(boxes, iou_threshold):
        return cpu.finite_nms(boxes, scores, iou_threshold)[:limit]
    if boxes.is_cpu:
        return cpu.plain_nms_cpu(boxes, scores, iou_threshold, limit)
    most = len(boxes) if limit is None else min(limit, len(boxes))
    # Sorted here, where no row is padding, as this takes fewer launches than `nms_padded`: the host's time is most.
    order = scores.argsort(descending=True, stable=True)
    valid = torch.ones(1, len(boxes), dtype=torch.bool, device=boxes.device)
    index, count = torch.ops.fastdet.nms(boxes.index_select(0, order)[None], valid, iou_threshold, most)
    return order.index_select(0, index[0, : int(count[0])])


def _batched_nms_indices(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, limit: int | None
) -> Tensor:
    """`batched_nms` of arguments that are checked, and whole numbers `idxs`."""
    if boxes.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    implemented = _is_implemented(boxes, iou_threshold)
    if boxes.is_cpu and implemented:
        given = cpu.plain(boxes), cpu.plain(scores), idxs.long()
        return cpu.batched_nms_cpu(given, [each.numpy() for each in given], iou_threshold, limit)
    return _batched_by_padding(boxes, scores, idxs, iou_threshold, limit, implemented)


def _batched_by_padding(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, limit: int | None, implemented: bool = True
) -> Tensor:
    """`_batched_nms_indices` of groups that are padded to few sizes."""
    order = scores.argsort(descending=True, stable=True)
    keep = torch.zeros_like(order, dtype=torch.bool)
    groups, group, sizes = torch.unique(idxs[order], return_inverse=True, return_counts=True)
    if not implemented:
        for rows in (order[group == each] for each in range(len(groups))):
            keep[rows[cpu.finite_nms(boxes[rows], scores[rows], iou_threshold)]] = True
        return order[keep[order]][:limit]
    for rows, valid in padded_groups(order, group, sizes):
        most = rows.shape[1] if limit is None else min(rows.shape[1], limit)
        kept = nms_padded(boxes[rows], scores[rows], iou_threshold, most, valid, presorted=True)
        keep[rows.gather(1, kept.index)[kept.valid]] = True
    return order[keep[order]][:limit]


def _is_implemented(boxes: Tensor, iou_threshold: float) -> bool:
    """Whether our implementations take it: the rest is so rare that torchvision's operator serves it."""
    return boxes.dtype == float32 and 0.0 <= iou_threshold <= 1.0


def _kept_fake(boxes: Tensor, *_: object) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


# For programs that are recorded, which can't contain the count.
define(
    "nms_indices(Tensor boxes, Tensor scores, float iou_threshold, SymInt? max_keep) -> Tensor",
    cpu=_nms_indices,
    cuda=_nms_indices,
    fake=_kept_fake,
)
define(
    "batched_nms_indices(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, SymInt? max_keep) -> Tensor",
    cpu=_batched_nms_indices,
    cuda=_batched_nms_indices,
    fake=_kept_fake,
)


@uncompiled
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """Indices of the boxes that greedy suppression keeps: torchvision's `nms`.

    Equal to `torchvision.ops.nms` on the CPU, index for index, ties included, with two exceptions: boxes with NaN or
    infinite corners are never returned and suppress nothing, and a box without area has IoU 0 with everything (for
    thresholds in [0, 1]). Traced, compiled and exported code has it as one operation, whose result varies in size.

    Args:
        boxes: [N, 4] x1, y1, x2, y2 in pixels, floating point: float64 if it or `scores` is, else in fp32.
        scores: [N] floating point.
        iou_threshold: a number; one below 0 lets every box suppress, from 1 on none does.
        max_keep: indices at most, the highest ranked; None: all. The work stops there.

    Returns:
        int64 [number kept], in descending order of score.

    Raises:
        TypeError, ValueError: an argument of another type, shape, range or device; the message names it.
    """
    if max_keep is None and _are_usual(boxes, scores, iou_threshold) and boxes.numel() <= 4 * cpu.MANY:
        try:
            return cpu.few_nms_cpu(boxes, scores, iou_threshold)
        # What the operator does not take is named below.
        except RuntimeError:
            pass
    if proxies := find_proxies((boxes, scores)):
        return handle_torch_function(nms, proxies, boxes, scores, iou_threshold, max_keep)
    boxes, scores, iou_threshold, max_keep = _check(boxes, scores, iou_threshold, max_keep)
    if _checks.is_recorded(boxes):
        return torch.ops.fastdet.nms_indices(boxes, scores, iou_threshold, max_keep)
    return _nms_indices(boxes, scores, iou_threshold, max_keep)


@uncompiled
def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, max_keep: int | None = None
) -> Tensor:
    """`nms` within each group of `idxs`, as torchvision's `batched_nms`.

    Groups are kept apart by their ids, not by shifted coordinates (as in torchvision), so that decisions close to the
    threshold are those of `nms` on each group alone. On a GPU groups are padded: all to one size and in one call, or,
    where that would be above eight times the memory of many boxes, each to the power of two above its size.

    Args:
        boxes, scores, iou_threshold: as of `nms`; no boxes may also be a tensor of shape [0].
        idxs: [N], real numbers or bool: the group of each box, on the device of `boxes`. Each NaN is a group.
        max_keep: indices at most, of all groups together; None: all.

    Returns:
        int64 indices of the boxes kept in all groups, in descending order of score (stable).

    Raises:
        TypeError, ValueError: an argument of another type, shape, range or device; the message names it.
    """
    if max_keep is None and _are_usual(boxes, scores, iou_threshold) and type(idxs) is Tensor:
        arrays = _checks.group_arrays(boxes, scores, idxs)
        if arrays is not None:
            return cpu.batched_nms_cpu((boxes, scores, idxs), arrays, iou_threshold)
    if proxies := find_proxies((boxes, scores, idxs)):
        return handle_torch_function(batched_nms, proxies, boxes, scores, idxs, iou_threshold, max_keep)
    if isinstance(boxes, Tensor) and boxes.shape == (0,):
        return boxes.new_zeros(0, dtype=torch.int64)
    boxes, scores, iou_threshold, max_keep = _check(boxes, scores, iou_threshold, max_keep)
    idxs = _checks.tensor("idxs", idxs, (boxes.shape[0],))
    _checks.same_device(boxes=boxes, idxs=idxs)
    if idxs.dtype not in _checks.INTEGERS:
        whole = not (idxs.is_floating_point() or idxs.is_complex())
        idxs = idxs.long() if whole else _checks.floats("idxs", idxs, double=True).unique(return_inverse=True)[1]
    if _checks.is_recorded(boxes):
        return torch.ops.fastdet.batched_nms_indices(boxes, scores, idxs, iou_threshold, max_keep)
    return _batched_nms_indices(boxes, scores, idxs, iou_threshold, max_keep)


def _are_usual(boxes: object, scores: object, iou_threshold: object) -> bool:
    """Whether these are as they mostly are: of some hundred boxes the checks would take a tenth of the time."""
    return (
        type(boxes) is type(scores) is Tensor
        and boxes.dtype is float32
        and boxes.is_cpu
        and type(iou_threshold) is float
        and 0.0 <= iou_threshold <= 1.0
        and not _checks.is_recording()
    )


def _check(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None
) -> tuple[Tensor, Tensor, float, int | None]:
    """The arguments of `nms`, boxes and scores in the wider of their dtypes, fp32 or float64."""
    boxes = _checks.boxes("boxes", boxes, double=True)
    scores = _checks.tensor("scores", _checks.floats("scores", scores, double=True), (boxes.shape[0],))
    _checks.same_device(boxes=boxes, scores=scores)
    if boxes.is_meta:
        raise ValueError("boxes is on the meta device, which has no values to suppress by")
    dtype = torch.promote_types(boxes.dtype, scores.dtype)
    iou_threshold = float(_checks.number("iou_threshold", iou_threshold))
    limit = None if max_keep is None else _checks.integer("max_keep", max_keep, least=0)
    return boxes.detach().to(dtype), scores.detach().to(dtype), iou_threshold, limit
