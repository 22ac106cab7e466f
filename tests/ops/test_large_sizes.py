"""Offsets beyond int32, of the kernels' last programs interpreted over sparse memory; grids beyond 16 bits."""

import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fastdet import ops
from fastdet.kernels import box_iou, decode, match, roi_align, roi_align_backward, sample
from fastdet.ops.cpu.threads import run_in_slices
from fastdet.ops.decode import decode_cpu, decode_cuda
from fastdet.ops.roi_align import roi_align_backward_cuda
from fastdet.ops.roi_pool import roi_pool_backward_cuda
from tests.helpers.checks import assert_close, random_boxes
from tests.helpers.large import only_programs, sparse_zeros
from tools.launches import record_launches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INT32 = 2**31


def interpreted(test):
    only = pytest.mark.skipif(not INTERPRETED, reason="only Triton's interpreter can run a few programs of a grid")
    return pytest.mark.kernel(only(test))


@pytest.fixture
def _poisoned_memory():
    """It would fill the sparse memory."""


@pytest.fixture
def zeros(tmp_path):
    return partial(sparse_zeros, tmp_path)


@pytest.mark.kernel
def test_decode_of_channels_that_lie_far_apart(kernel_device, zeros):
    stride, make = 800_000_000, zeros if kernel_device.type == "cpu" else partial(torch.zeros, device=kernel_device)
    deltas = make(3 * stride + 1, dtype=torch.float16).as_strided((1, 4, 1, 1), (1, stride, 1, 1))
    deltas.copy_(torch.tensor([0.5, 0.25, 0.125, -0.5])[:, None, None])
    tensors = torch.ones(1, 1, 1, 1), torch.tensor([[0, 0, 8.0, 8]]), torch.tensor([[99, 99]]), torch.zeros(1)
    boxes, _ = decode_cuda(deltas, *(each.to(kernel_device) for each in tensors), 16, 16, 4.0)
    assert_close(boxes.cpu(), decode_cpu(deltas.cpu(), *tensors, 16, 16, 4.0)[0])


@interpreted
def test_decode_of_more_candidates_than_int32_counts(zeros):
    height, width = INT32 // 65536 + 1, 65536
    deltas, logits = (torch.tensor(0.25).expand(2, channels, height, width) for channels in (4, 1))
    anchors, sizes, min_side = torch.tensor([[0, 0, 8.0, 8]]), torch.full((2, 2), 1 << 23), torch.zeros(2)
    boxes, scores = zeros(2, height * width, 4), zeros(2, height * width)
    with only_programs({"_decode_kernel": [-1]}):
        decode.launch(deltas, logits, anchors, sizes, min_side, boxes, scores, stride=(16, 16), clamp=4.0)
    moved = anchors + torch.tensor([width - 1, height - 1]).repeat(2) * 16
    expected = decode_cpu(deltas[1:, :, :1, :1], logits[1:, :, :1, :1], moved, sizes[1:], min_side[1:], 16, 16, 4.0)
    assert torch.equal(boxes[1, -1], expected[0][0, 0])
    assert torch.equal(scores[1, -2:], torch.tensor([0.25, 0.25]))


@pytest.mark.kernel
def test_decode_of_a_distance_of_anchors_beyond_int32(kernel_device):
    anchors, sizes = torch.tensor([[0, 0, 8.0, 8]]), torch.full((1, 2), 1 << 40)
    tensors = torch.zeros(1, 4, 3, 2), torch.zeros(1, 1, 3, 2), anchors, sizes, torch.zeros(1)
    steps = INT32 - 1, INT32 - 1, 4.0
    boxes, _ = decode_cuda(*(each.to(kernel_device) for each in tensors), *steps)
    assert torch.equal(boxes.cpu(), decode_cpu(*tensors, *steps)[0])


@interpreted
def test_box_iou_of_more_pairs_than_int32_counts(zeros):
    count = 60_000
    boxes1, boxes2, out = zeros(1, count, 4), zeros(1, count, 4), zeros(1, count, count)
    boxes1[0, -32:], boxes2[0, -90:] = random_boxes(32), random_boxes(90)
    with only_programs({"_box_iou_kernel": [-1]}):
        box_iou.launch(boxes1, boxes2, boxes1, boxes2, out, kind="iou", eps=0.0)
    expected = ops.box_iou(boxes1[0, -32:], boxes2[0, -90:])
    assert expected.max() > 0
    assert torch.equal(out[0, -32:, -90:], expected)


@interpreted
def test_match_of_more_candidates_than_int32_counts(zeros):
    batch, count, num_gt = 1100, 2_000_000, 9
    candidates, gt_boxes = zeros(batch, count, 4), torch.zeros(batch, num_gt, 4)
    candidates[-1, -64:], gt_boxes[-1] = random_boxes(64), random_boxes(num_gt)
    valid, gt_valid = zeros(batch, count, dtype=torch.bool), torch.ones(batch, num_gt, dtype=torch.bool)
    valid[-1, -60:] = True
    results = [zeros(batch, count, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int64)]
    results.append(zeros(batch, count, 4))
    gt_best = torch.zeros(batch, num_gt, dtype=torch.int32)
    rules = {"high": 0.3, "low": 0.1, "weights": (1.0, 1.0, 1.0, 1.0)}
    with only_programs({"_best_kernel": [-1], "_match_kernel": [-2, -1]}):
        match.launch(candidates, gt_boxes, gt_valid, valid, None, gt_best, *results, ignore_iof=0.5, **rules)
    expected = ops.match(candidates[-1:, -64:], gt_boxes[-1:], valid=valid[-1:, -64:], allow_low_quality=True, **rules)
    assert set(expected.label.flatten().tolist()) == {-1, 0, 1}
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found[-1:, -64:], wanted)


@interpreted
@pytest.mark.parametrize(("num_candidates", "num_samples"), [(2048, 8), (8192, 2048)], ids=["once", "thinned"])
def test_sample_of_more_candidates_than_int32_counts(zeros, num_candidates, num_samples):
    batch = INT32 // 2048 + 1
    label, seed = zeros(batch, num_candidates, dtype=torch.int64), torch.arange(batch)
    label[-1] = torch.randint(-1, 2, (num_candidates,))
    code = position = None
    span = sample.thinning(num_candidates, num_samples)
    with only_programs({"_sample_kernel": [-2, -1]}):
        if span:
            shape = (batch, num_candidates // span, num_samples)
            code, position = zeros(*shape, dtype=torch.int32), zeros(*shape, dtype=torch.int32)
            sample.launch_thin(label, seed, code, position, span=span, max_positive=4)
            assert code.shape[1] == 2
        index, weight = zeros(batch, num_samples, dtype=torch.int64), zeros(batch, num_samples)
        sample.launch(label, seed, code, position, index, weight, max_positive=4)
    expected = ops.sample(label[-1:], num_samples, 4, seed[-1:])
    assert expected.weight.min() > 0 or span
    assert torch.equal(index[-1:], expected.index)
    assert torch.equal(weight[-1:], expected.weight)


# A map of more than 2^31 values an image, and RoIs that pool more than that; the last lies in the last image's corner.
CHANNELS, SIDE, NUM_ROIS = 512, 2100, 2_100_000


@interpreted
def test_roi_align_of_more_values_than_int32_counts(zeros):
    features = zeros(2, CHANNELS, SIDE, SIDE, dtype=torch.float16, layout=torch.channels_last)
    corner = features[1:, :, -8:, -8:]
    corner.copy_(torch.randn(corner.shape))
    rois, pooled = zeros(NUM_ROIS, 5), zeros(NUM_ROIS, CHANNELS, 7, 7, dtype=torch.float16, layout=torch.channels_last)
    rois[-1] = torch.tensor([1, SIDE - 7, SIDE - 6, SIDE - 1, SIDE - 1])
    with only_programs({"_roi_align_kernel": [-1]}):
        roi_align.launch([features], rois, pooled, scales=[1.0], edges=[], sampling_ratio=2, aligned=False)
    expected = ops.roi_align(corner, torch.tensor([[0, 1.0, 2, 7, 7]]), 7, 1.0, 2)
    assert expected.abs().min() > 0
    assert_close(pooled[-1, :, -1, -1], expected[0, :, -1, -1], torch.float16)


@interpreted
def test_gradient_of_roi_align_of_more_values_than_int32_counts(zeros):
    grad = zeros(NUM_ROIS, CHANNELS, 7, 7, dtype=torch.float16, layout=torch.channels_last)
    grad[-1] = torch.randn(CHANNELS, 7, 7)
    rois = zeros(NUM_ROIS, 5)
    rois[-1] = torch.tensor([1, SIDE - 7, SIDE - 6, SIDE - 1, SIDE - 1])
    grad_input = zeros(2, CHANNELS, SIDE, SIDE, dtype=torch.float16, layout=torch.channels_last)
    rows, columns = roi_align_backward.tiles([(SIDE, SIDE)])
    int32, int64 = partial(zeros, dtype=torch.int32), partial(zeros, dtype=torch.int64)
    # As if the first image had more visits than int32 counts, and the second the last RoI alone.
    extents = torch.tensor([[0, NUM_ROIS - 1, INT32], [NUM_ROIS - 1, NUM_ROIS, 1]])
    blocks = -(-NUM_ROIS // 128)
    # Of the lines of rows and of columns those that the last tile reads, each its last block of RoIs.
    lines = [rows - 1, rows, rows + columns, rows + columns + 1]
    chosen = {
        "_weights_kernel": range(-14, 0),
        "_spans_kernel": [(line + 1) * blocks - 1 for line in lines],
        "_extents_kernel": [],
        "_visits_kernel": [-1],
        "_roi_align_backward_kernel": [-1],
    }
    with only_programs(chosen):
        roi_align_backward.launch(
            grad,
            rois,
            [grad_input],
            images=int32(NUM_ROIS),
            ranges=int32(2, 14, NUM_ROIS),
            weights_h=zeros(NUM_ROIS, 7, rows * 4),
            weights_w=zeros(NUM_ROIS, 7, columns * 4),
            extents=extents,
            spans=int32(2, rows + columns + 2, NUM_ROIS),
            bounds=int64(2 * rows * columns, 2),
            visits=int32(2 * INT32),
            scales=[1.0],
            edges=[],
            sampling_ratio=2,
            aligned=False,
        )
    small = torch.zeros(1, CHANNELS, 8, 8, dtype=torch.float16, requires_grad=True)
    pooled = ops.roi_align(small, torch.tensor([[0, 1.0, 2, 7, 7]]), 7, 1.0, 2)
    (expected,) = torch.autograd.grad(pooled, small, grad[-1:])
    assert expected.abs().amin((0, 1))[-4:, -4:].max() > 0
    assert_close(grad_input[1:, :, -4:, -4:], expected[:, :, -4:, -4:], torch.float16)


def test_more_values_than_torchvision_counts_are_refused(zeros):
    features, grad, rois = zeros(3, 512, 1200, 1200), torch.zeros(1).expand(2, 22_000_000, 7, 7), torch.zeros(2, 5)
    sizes, argmax = (1, grad.shape[1], 1, 1), torch.zeros(1, dtype=torch.int16).expand(grad.shape)
    calls = {
        "features": lambda: ops.roi_align(features, rois, 7),
        "input": lambda: ops.roi_pool(features, rois, 7),
        "grad of align": lambda: torch.ops.fastdet.roi_align_backward(grad, rois, sizes, [1.0], 2, False, 224, 4),
        "grad of pool": lambda: torch.ops.fastdet.roi_pool_backward(grad, rois, argmax, 1.0, 7, 7, *sizes),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name.split()[0]} must hold fewer than 2\*\*31 values on the CPU"):
            call()


@pytest.mark.parametrize("threads", [1, 2])
def test_no_call_of_torchvision_counts_beyond_int32(threads):
    before, slices = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        run_in_slices(5000, 1 << 20, 1 << 20, lambda first, last: slices.append((first, last)))
    finally:
        torch.set_num_threads(before)
    slices.sort()
    assert [first for first, _ in slices] == [0, *(last for _, last in slices[:-1])]
    assert slices[-1][1] == 5000
    assert max(last - first for first, last in slices) << 20 < INT32


def test_grids_of_long_maps():
    """The second and third axes of a grid are limited to 65535 programs."""
    if INTERPRETED:
        pytest.skip("launches that are interpreted are not recorded")
    with record_launches() as launches:
        grad, rois = torch.zeros(3, 1, 1, 1), torch.zeros(3, 5)
        roi_align_backward_cuda(grad, rois, [1, 1, 4, 262_144], [1.0], 2, False, 224.0, 4)
        roi_pool_backward_cuda(grad, rois, torch.zeros(3, 1, 1, 1, dtype=torch.int32), 1.0, 1, 1, 1, 1, 4, 262_144)
    assert len(launches) == 7
    for launch in launches:
        assert max(launch.grid[1:], default=1) <= 65535
