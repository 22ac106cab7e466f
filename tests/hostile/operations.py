"""Calls of every operation, drawn at random: valid ones, and ones in which an argument or two are hostile.

A call either raises TypeError or ValueError naming an argument, or gives what a reference gives for the same values.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastdet import boxes as box_algebra
from fastdet import ops
from tests.helpers.checks import assert_close

Draw = Callable[[st.SearchStrategy[Any]], Any]

# Numbers that overflow, are rounded to another, or are none.
HOSTILE_SCALARS = [
    0, -1, 1, 3, 65536, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64 + 1, -(2**63) - 1, 10**400,
    0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e38, 1e39, 1e300, math.nan, math.inf, -math.inf,
    True, False, None, "1", 1j, (), (1,), [2, 2], np.float32(0.5), np.int64(2), object(),
]  # fmt: skip
VALUES = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e20, -1e9, 2.0**31, 1e-45, -0.0]


class Case(NamedTuple):
    """An operation; how its valid arguments are drawn; and the check of its result by arguments that are plain."""

    function: Callable[..., Any]
    arguments: Callable[[Draw], dict[str, Any]]
    check: Callable[..., None]


def check_call(name: str, draw: Draw) -> None:
    """Draw a call of the operation and check what it does."""
    case = CASES[name]
    given = case.arguments(draw)
    for argument in draw(st.lists(st.sampled_from(sorted(given)), max_size=2, unique=True)):
        given[argument] = make_hostile(draw, given[argument])
    try:
        found = case.function(**given)
    except (TypeError, ValueError) as error:
        if not re.search(rf"\b({'|'.join(given)})\b", str(error)):
            raise
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):  # it is too much for this machine, and reports it
            raise
    else:
        if any(isinstance(value, Tensor) and value.is_meta for value in (found, *given.values())):
            return  # shapes without values
        case.check(found, **{argument: plain(value) for argument, value in given.items()})


def make_hostile(draw: Draw, value: Any) -> Any:
    """Another value for an argument; half of those for a tensor are views and dtypes that may well be accepted."""
    if isinstance(value, list) and value and draw(st.booleans()):
        return [make_hostile(draw, value[0]), *value[1:]]
    if isinstance(value, Tensor):
        made_hostile = value.layout != torch.strided or value.is_nested or value.is_quantized or not value.is_cpu
        return value if made_hostile else draw(st.sampled_from(TENSORS))(draw, value)
    return draw(st.sampled_from(HOSTILE_SCALARS))


def _fill(draw: Draw, value: Tensor) -> Tensor:
    assume(value.numel() > 0)
    changed = value.clone() if value.is_floating_point() else value.float()
    changed.view(-1)[draw(st.integers(0, value.numel() - 1))] = draw(st.sampled_from(VALUES))
    return changed


TENSORS: list[Callable[[Draw, Tensor], Any]] = [
    _fill,
    _fill,
    _fill,
    lambda draw, x: x.to(draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))),
    lambda draw, x: x.to(draw(st.sampled_from([torch.int64, torch.uint8, torch.bool, torch.complex64]))),
    lambda draw, x: x.detach().clone().requires_grad_() if x.is_floating_point() else x,
    lambda draw, x: torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else x,
    lambda draw, x: torch.stack([x, x], -1)[..., 0],
    lambda draw, x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda draw, x: x[:1].expand_as(x) if len(x) else x,
    lambda draw, x: x[:0],
    lambda draw, x: x[None],
    lambda draw, x: x.reshape(-1),
    lambda draw, x: x[..., :-1],
    lambda draw, x: x.to("meta"),
    lambda draw, x: x.to_sparse(),
    lambda draw, x: torch.nested.nested_tensor([x, x], layout=torch.jagged) if x.ndim > 1 else x,
    lambda draw, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    lambda draw, x: torch.tensor(draw(st.sampled_from([0.0, 1.0]))),
    lambda draw, x: draw(st.sampled_from([None, "tensor", x.numpy(), x.tolist(), object()])),
]


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().resolve_neg().clone()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def boxes(draw: Draw, *shape: int, side: float = 40.0) -> Tensor:
    """Boxes [*shape, 4] on a grid of half pixels, so that ties and equal boxes occur; some without area."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    corner = (torch.rand(*shape, 2, generator=generator) * side).round() / 2
    extent = (torch.rand(*shape, 2, generator=generator) * side).round() / 2
    return torch.cat([corner, corner + extent], -1)


def numbers(draw: Draw, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))


def count(draw: Draw, most: int = 12) -> int:
    return int(draw(st.integers(0, most)))


def _nms_arguments(draw: Draw) -> dict[str, Any]:
    number = count(draw, 80)
    scores = numbers(draw, number).mul(4).round()
    return {"boxes": boxes(draw, number), "scores": scores, "iou_threshold": 0.5, "max_keep": None}


def _check_nms(found: Tensor, boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None) -> None:
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    rows = boxes.isfinite().all(1).nonzero()[:, 0]
    kept = torchvision.ops.nms(boxes.to(dtype)[rows], scores.to(dtype)[rows], float(iou_threshold))
    assert torch.equal(found, rows[kept][:max_keep])


def _check_batched_nms(
    found: Tensor, boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, max_keep: int | None
) -> None:
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for row in range(len(idxs)):
        members = (idxs == idxs[row]) if idxs[row] == idxs[row] else torch.arange(len(idxs)) == row
        rows = members.nonzero()[:, 0]
        if rows[0] == row:
            _, chosen = None, ops.nms(boxes[rows], scores[rows], iou_threshold)
            keep[rows[chosen]] = True
    order = scores.float().argsort(descending=True, stable=True)
    assert torch.equal(found, order[keep[order]][:max_keep])


def _padded_arguments(draw: Draw) -> dict[str, Any]:
    shape = count(draw, 3), count(draw, 40)
    scores, valid = numbers(draw, *shape), numbers(draw, *shape) > -1
    return {"boxes": boxes(draw, *shape), "scores": scores, "iou_threshold": 0.5, "max_keep": 7, "valid": valid}


def _check_padded(found: ops.Kept, max_keep: int, **given: Any) -> None:
    valid = given["valid"]
    for group, number in enumerate(found.count.tolist()):
        rows = torch.arange(found.index.shape[1]) if valid is None else valid[group].nonzero()[:, 0]
        if valid is None:
            rows = torch.arange(given["scores"].shape[1])
        kept = ops.nms(given["boxes"][group][rows], given["scores"][group][rows], given["iou_threshold"], max_keep)
        assert torch.equal(found.index[group, :number], rows[kept])
        assert not found.index[group, number:].any()


def _pairs(draw: Draw) -> dict[str, Any]:
    return {"boxes1": boxes(draw, count(draw)), "boxes2": boxes(draw, count(draw))}


def _check_pairs(name: str) -> Callable[..., None]:
    def check(found: Tensor, boxes1: Tensor, boxes2: Tensor, **eps: float) -> None:
        assert found.shape[-2:] == (boxes1.shape[-2], boxes2.shape[-2])
        each = [x.double() for x in (boxes1, boxes2)]
        moderate = [(x.abs() < 1e6).all(-1) & (x[..., 2:] - x[..., :2] > 0.1).all(-1) for x in each]
        if boxes1.ndim == boxes2.ndim == 2 and boxes1.is_floating_point() and boxes2.is_floating_point():
            wanted = getattr(torchvision.ops, name)(*each)
            both = moderate[0][:, None] & moderate[1]
            assert_close(found[both].double(), wanted[both])

    return check


def _levels(draw: Draw) -> list[Tensor]:
    batch = draw(st.integers(1, 2))
    return [numbers(draw, batch, 3, 9 // 2**level, 12 // 2**level) for level in range(draw(st.integers(1, 2)))]


def _roi_arguments(draw: Draw) -> dict[str, Any]:
    (features, *_) = _levels(draw)
    rois = [boxes(draw, count(draw, 4), side=30) for _ in range(len(features))]
    if draw(st.booleans()):
        return {"input": features, "boxes": rois, "output_size": 2, "spatial_scale": 0.5}
    index = torch.cat([torch.full((len(each), 1), float(image)) for image, each in enumerate(rois)])
    rows = torch.cat([index, torch.cat(rois)], 1)
    return {"input": features, "boxes": rows, "output_size": (2, 3), "spatial_scale": 0.5}


def _align_arguments(draw: Draw) -> dict[str, Any]:
    return {**_roi_arguments(draw), "sampling_ratio": draw(st.sampled_from([-1, 0, 2])), "aligned": draw(st.booleans())}


def _check_rois(name: str) -> Callable[..., None]:
    def check(found: Tensor, input: Tensor, boxes: Any, output_size: Any, spatial_scale: float, **rules: Any) -> None:
        rows = boxes if isinstance(boxes, Tensor) else torch.cat([x.reshape(-1, 4) for x in boxes])
        known = input.isfinite().all() and rows.isfinite().all() and bool((rows.abs() < 1e4).all())
        if known and abs(spatial_scale) < 100:
            boxes = boxes.float() if isinstance(boxes, Tensor) else [x.float() for x in boxes]
            size = tuple(output_size) if isinstance(output_size, tuple | list) else int(output_size)
            try:
                wanted = getattr(torchvision.ops, name)(input.float(), boxes, size, float(spatial_scale), **rules)
            except ValueError:
                return  # its list of the samples of an inverted box has a negative length
            assert_close(found.float(), wanted, input.dtype if input.dtype != torch.float64 else torch.float32)

    return check


def _multiscale_arguments(draw: Draw) -> dict[str, Any]:
    features = _levels(draw)
    rois = [boxes(draw, count(draw, 4), side=30) for _ in range(len(features[0]))]
    scales = [0.5 / 2**level for level in range(len(features))]
    return {"features": features, "boxes": rois, "output_size": 2, "scales": scales, "sampling_ratio": 2}


def _batched_arguments(draw: Draw) -> dict[str, Any]:
    given = _multiscale_arguments(draw)
    number = count(draw, 4)
    batch = len(given["features"][0])
    return {**given, "boxes": boxes(draw, batch, number), "valid": numbers(draw, batch, number) > 0}


def _batched_pool_arguments(draw: Draw) -> dict[str, Any]:
    given = _batched_arguments(draw)
    (features, *_) = given["features"]
    kept = {name: given[name] for name in ("boxes", "output_size", "valid")}
    return {"input": features, "spatial_scale": 0.5, **kept}


def _check_shape(found: Tensor, **given: Any) -> None:
    assert found.shape[-2:].numel() >= 1
    assert found.ndim in (4, 5)


def _decode_arguments(draw: Draw) -> dict[str, Any]:
    batch, anchors, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), count(draw, 4), count(draw, 4)
    return {
        "deltas": numbers(draw, batch, anchors * 4, height, width),
        "logits": numbers(draw, batch, anchors * draw(st.integers(1, 2)), height, width),
        "cell_anchors": boxes(draw, anchors),
        "sizes": torch.tensor([[20, 30]] * batch),
        "stride": (8, 8),
        "min_side": draw(st.sampled_from([None, 0.0, 3.0])),
        "clamp": draw(st.sampled_from([None, 4.0])),
    }


def _check_decode(found: ops.Decoded, sizes: Tensor, **given: Any) -> None:
    assert found.boxes.isfinite().all()
    assert not found.scores.isnan().any()
    assert (found.scores < math.inf).all()
    limit = sizes.flip(1).repeat(1, 2)[:, None].clamp(min=0)
    assert ((found.boxes >= 0) & (found.boxes <= limit)).all()


def _match_arguments(draw: Draw) -> dict[str, Any]:
    batch, candidates, truths = draw(st.integers(1, 2)), count(draw, 30), count(draw, 5)
    return {
        "candidates": boxes(draw, *draw(st.sampled_from([(batch,), ()])), candidates),
        "gt_boxes": boxes(draw, batch, truths),
        "gt_valid": numbers(draw, batch, truths) > -1,
        "high": 0.7,
        "low": 0.3,
        "allow_low_quality": draw(st.booleans()),
        "valid": numbers(draw, batch, candidates) > -1,
        "gt_ignore": numbers(draw, batch, truths) > 1,
        "ignore_iof": 0.5,
        "weights": [1.0, 1.0, 1.0, 1.0],
    }


def _check_match(found: ops.Matches, candidates: Tensor, gt_boxes: Tensor, **given: Any) -> None:
    assert ((found.iou >= 0) & (found.iou <= 1)).all()
    assert ((found.index >= 0) & (found.index < max(gt_boxes.shape[1], 1))).all()
    assert torch.isin(found.label, torch.tensor([-1, 0, 1])).all()
    assert found.deltas[found.label == 1].isfinite().all() or max(given["weights"]) > 1e6
    if gt_boxes.shape[1]:
        chosen = gt_boxes.float().gather(1, found.index[..., None].expand(-1, -1, 4))
        reference = candidates.float().expand(len(gt_boxes), -1, 4)
        moderate = (chosen.abs() < 1e6).all(-1) & (reference.abs() < 1e6).all(-1) & (found.iou > 0)
        rows = torch.stack([reference[moderate], chosen[moderate]]).double()
        corners = torch.maximum(rows[0, :, :2], rows[1, :, :2]), torch.minimum(rows[0, :, 2:], rows[1, :, 2:])
        inter = (corners[1] - corners[0]).clamp(min=0).prod(1)
        areas = [torch.stack(box_algebra.sides(each)).prod(0) for each in rows]
        assert_close(found.iou[moderate].double(), inter / (areas[0] + areas[1] - inter))


def _sample_arguments(draw: Draw) -> dict[str, Any]:
    shape = count(draw, 3), count(draw, 40)
    label = numbers(draw, *shape).sign().long()
    return {"label": label, "num_samples": 6, "max_positive": 3, "seed": torch.tensor([draw(st.integers(0, 99))])}


def _check_sample(found: ops.Sampled, label: Tensor, num_samples: int, max_positive: int, seed: Tensor) -> None:
    for image in range(len(label)):
        index = found.index[image][found.weight[image] > 0]
        assert len(index.unique()) == len(index)
        positives = int((label[image] == 1).sum())
        wanted = min(positives, max_positive, num_samples)
        assert int((label[image][index] == 1).sum()) == wanted
        assert int((label[image][index] == 0).sum()) == min(int((label[image] == 0).sum()), num_samples - wanted)


def _with_idxs(draw: Draw) -> dict[str, Any]:
    given = _nms_arguments(draw)
    return {**given, "idxs": numbers(draw, len(given["scores"])).abs().long()}


CASES = {
    "nms": Case(ops.nms, _nms_arguments, _check_nms),
    "batched_nms": Case(ops.batched_nms, _with_idxs, _check_batched_nms),
    "nms_padded": Case(ops.nms_padded, _padded_arguments, _check_padded),
    **{
        name: Case(getattr(ops, name), _pairs, _check_pairs(name))
        for name in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
    },
    "roi_align": Case(ops.roi_align, _align_arguments, _check_rois("roi_align")),
    "roi_pool": Case(ops.roi_pool, _roi_arguments, _check_rois("roi_pool")),
    "multiscale_roi_align": Case(ops.multiscale_roi_align, _multiscale_arguments, _check_shape),
    "batched_roi_align": Case(ops.batched_roi_align, _batched_arguments, _check_shape),
    "batched_roi_pool": Case(ops.batched_roi_pool, _batched_pool_arguments, _check_shape),
    "decode": Case(ops.decode, _decode_arguments, _check_decode),
    "match": Case(ops.match, _match_arguments, _check_match),
    "sample": Case(ops.sample, _sample_arguments, _check_sample),
}
