"""How often a kernel is compiled anew as images and batches change in size."""

import os
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from fastdet.ops.box_iou import box_iou_cuda
from fastdet.ops.decode import decode_cuda
from fastdet.ops.match import match_cuda
from fastdet.ops.nms import nms_cuda, nms_cuda_cooperative
from fastdet.ops.roi_align import roi_align_backward_cuda, roi_align_cuda
from fastdet.ops.roi_pool import roi_pool_backward_cuda, roi_pool_cuda
from fastdet.ops.sample import sample_cuda
from tools.launches import launches_of

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="counts what would be compiled")

# Cells of a feature map, height and width: multiples of 16 and of 8, odd ones, and a side of 1.
GRIDS = [(32, 48), (37, 56), (38, 57), (40, 64), (56, 37), (48, 33), (1, 64), (50, 68)]
BATCHES = (2, 16)


def _boxes(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, 4)


def _nms(batch: int, height: int, width: int, suppress: Callable[..., object] = nms_cuda) -> None:
    count = min(9 * height * width, 6000)
    valid = torch.ones(batch, count, dtype=torch.bool)
    suppress(_boxes(batch, count), valid, 0.7, 300)


def _nms_cooperative(batch: int, height: int, width: int) -> None:
    _nms(batch, height, width, nms_cuda_cooperative)


def _match(batch: int, height: int, width: int) -> None:
    valid = torch.ones(batch, height + 3, dtype=torch.bool)
    match_cuda(_boxes(9 * height * width), _boxes(batch, height + 3), valid, None, None, 0.7, 0.3, True, 0.5, [1.0] * 4)


def _decode(batch: int, height: int, width: int) -> None:
    deltas, logits = (torch.zeros(batch, channels, height, width) for channels in (36, 18))
    deltas, logits = (part.contiguous(memory_format=torch.channels_last) for part in (deltas, logits))
    sizes = torch.zeros(batch, 2, dtype=torch.int64)
    decode_cuda(deltas, logits, _boxes(9), sizes, torch.zeros(batch), 16, 16, 4.0)


def _sample(batch: int, height: int, width: int) -> None:
    label = torch.zeros(batch, 9 * height * width, dtype=torch.int64)
    sample_cuda(label, torch.zeros(1, dtype=torch.int64), 256, 128)


def _box_iou(batch: int, height: int, width: int) -> None:
    box_iou_cuda(_boxes(batch, 9 * height * width), _boxes(batch, 512 + 4 * height), "iou", 1e-7)


def _roi_pool(batch: int, height: int, width: int) -> None:
    rois = torch.zeros(batch * (height + 7), 5)
    pooled, argmax = roi_pool_cuda(torch.zeros(batch, 64, height, width), rois, 1 / 16, 7, 7)
    roi_pool_backward_cuda(pooled, rois, argmax, 1 / 16, 7, 7, batch, 64, height, width)


def _roi_align(batch: int, height: int, width: int) -> None:
    sizes = [(height, width), (height + 1 >> 1, width + 1 >> 1)]
    levels, rois = [torch.zeros(batch, 64, *size) for size in sizes], torch.zeros(batch * (height + 7), 5)
    rules = (2, False, 224.0, 4)
    pooled = roi_align_cuda(rois, levels, [1 / 8, 1 / 16], 7, 7, *rules)
    shape = [batch, 64, *(side for size in sizes for side in size)]
    roi_align_backward_cuda(pooled, rois, shape, [1 / 8, 1 / 16], *rules)


def variants(call: Callable[[int, int, int], None]) -> dict[str, int]:
    """How many variants of each kernel all sizes need."""
    found: dict[str, set[tuple[str, str]]] = {}
    for batch in BATCHES:
        for height, width in GRIDS:
            for launch in launches_of(lambda: call(batch, height, width)):  # noqa: B023
                key = launch.source().hash(), str(launch.options())
                found.setdefault(launch.kernel.fn.__name__, set()).add(key)
    return {name: len(keys) for name, keys in found.items()}


@pytest.mark.parametrize("call", [_roi_pool, _roi_align])
def test_all_image_sizes_share_a_kernel(call):
    found = variants(call)
    assert len(found) >= 5
    assert set(found.values()) == {1}


@pytest.mark.parametrize(
    ("call", "most"),
    [(_decode, 2), (_match, 2), (_box_iou, 2), (_sample, 4), (_nms, 8), (_nms_cooperative, 4)],
)
def test_few_block_sizes_serve_all_image_sizes(call, most):
    """These choose their blocks by the number of boxes, in few steps; suppression by whether there is one group too."""
    assert max(variants(call).values()) <= most


@pytest.mark.parametrize("call", [_nms, _nms_cooperative, _match, _decode, _sample, _box_iou, _roi_pool, _roi_align])
def test_only_the_first_axis_of_a_grid_grows_with_the_batch(call):
    """The others end at 65535."""
    few, many = (launches_of(lambda: call(batch, 4, 6)) for batch in (2, 64))  # noqa: B023
    for before, after in zip(few, many, strict=True):
        assert before.grid[1:] == after.grid[1:], before.kernel.fn.__name__
