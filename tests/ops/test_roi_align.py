import itertools
import math
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from fastdet import ops
from fastdet.ops import _pyramid
from fastdet.ops.roi_align import roi_align_backward_cpu, roi_align_backward_cuda, roi_align_cpu, roi_align_cuda
from tests.helpers.checks import assert_close, check_operator

MODULE = sys.modules[roi_align_cpu.__module__]
FOUR_LEVELS = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def sampled_by_definition(plane: np.ndarray, y: float, x: float) -> float:
    """The features between the cells at (y, x): 0 further than a cell outside, clamped to the map nearer."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = (min(max(place, 0.0), side - 1.0) for place, side in ((y, height), (x, width)))
    total = 0.0
    for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        weight = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
        if weight:
            total += weight * plane[row, column]
    return total


def samples_by_definition(low: float, high: float, num_bins: int, ratio: int, aligned: bool) -> list[list[float]]:
    """Where the samples of each bin lie along one axis, in cells."""
    low, high = (low - 0.5, high - 0.5) if aligned else (low, max(high, low + 1))
    size = (high - low) / num_bins
    count = ratio if ratio > 0 else max(math.ceil(size), 0)
    return [[low + (index + (k + 0.5) / count) * size for k in range(count)] for index in range(num_bins)]


def loop_roi_align(
    input: Tensor, rois: Tensor, scale: float, size: tuple[int, int], ratio: int, aligned: bool
) -> np.ndarray:
    """One sample after another, in float64."""
    pooled = np.zeros((len(rois), input.shape[1], *size))
    features = input.double().numpy()
    for r, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (corner * scale for corner in corners)
        rows = samples_by_definition(y1, y2, size[0], ratio, aligned)
        columns = samples_by_definition(x1, x2, size[1], ratio, aligned)
        for c, i, j in itertools.product(range(input.shape[1]), range(size[0]), range(size[1])):
            values = [sampled_by_definition(features[int(image), c], y, x) for y in rows[i] for x in columns[j]]
            pooled[r, c, i, j] = sum(values) / max(len(values), 1)
    return pooled


def random_rois(num_rois: int, batch: int, side: float) -> Tensor:
    """Of all sizes; some stick out of a square of `side` pixels, lie outside it, or are inverted."""
    center = (torch.rand(num_rois, 2) * 1.4 - 0.2) * side
    half = torch.rand(num_rois, 2) ** 2 * side * 0.7 - 0.03 * side
    image = torch.randint(batch, (num_rois, 1)).float()
    rois = torch.cat([image, center - half, center + half], 1)
    rois[::3] = rois[::3].round()
    return rois


def random_case(seed: int) -> tuple[Tensor, Tensor, float, tuple[int, int]]:
    torch.manual_seed(seed)
    batch, channels, height, width = (int(torch.randint(1, n, ())) for n in (4, 9, 22, 22))
    scale = (1.0, 0.5, 1 / 16, 0.3, 2.7)[seed % 5]
    size = ((7, 7), (1, 1), (3, 5), (6, 2), (14, 14))[seed // 5 % 5]
    input = torch.randn(batch, channels, height, width)
    if seed % 3 == 1:
        input = input.contiguous(memory_format=torch.channels_last)
    if seed % 3 == 2:
        input = input.transpose(2, 3).contiguous().transpose(2, 3)
    return input, random_rois(int(torch.randint(1, 40, ())), batch, max(height, width) / scale), scale, size


def awkward_rois() -> Tensor:
    """For maps of two images at 1/16: padding, NaN, infinite, a point, inverted, far outside, all of the map."""
    nan, inf = float("nan"), float("inf")
    return torch.tensor(
        [
            [-1, 0, 0, 90, 90],
            [2, 0, 0, 90, 90],
            [nan, 0, 0, 90, 90],
            [0, nan, 0, 90, 90],
            [1, 0, 0, 90, nan],
            [1, -inf, -inf, inf, inf],
            [0, 40, 40, 40, 40],
            [0, 90, 90, 8, 8],
            [1, 1e30, 0, 1e30, 50],
            [1, -900, -900, -500, -500],
            [1, -3e9, -70, 3e9, 200],
            [0, 0, 0, 143, 111],
            [1, 8, 8, 24, 40],
            [1, -9000, 20, 12000, 60],
        ]
    )


def pyramid(batch: int, channels: int, height: int, width: int, num_levels: int) -> list[Tensor]:
    return [torch.randn(batch, channels, -(-height // 2**k), -(-width // 2**k)) for k in range(num_levels)]


def boxes_of_all_levels(num_boxes: int, side: float) -> Tensor:
    """[num_boxes, 4], with sides from a few pixels to twice `side`."""
    center = torch.rand(num_boxes, 2) * side
    half = torch.exp2(torch.rand(num_boxes, 1) * 9 - 8) * side * (0.5 + torch.rand(num_boxes, 2))
    return torch.cat([center - half, center + half], 1)


def areas_beside(edges: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """The edges and the eighty fp32 values next to each."""
    whole = torch.int64 if dtype == torch.float64 else torch.int32
    bits = torch.tensor(edges, dtype=dtype).view(whole)[:, None] + torch.arange(-40, 41, dtype=whole)
    return bits.view(dtype).flatten()


RULES = list(itertools.product((1, 2, 3, -1, 0), (False, True)))


@pytest.mark.parametrize(("ratio", "aligned"), RULES)
@pytest.mark.parametrize(
    ("shape", "scale", "size"),
    [((2, 2, 6, 9), 1 / 16, (3, 2)), ((1, 1, 11, 5), 0.5, (2, 3)), ((3, 1, 1, 1), 1.0, (1, 2))],
)
def test_values_and_gradients_are_those_of_a_loop(shape, scale, size, ratio, aligned):
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rois = random_rois(9, shape[0], max(shape[2:]) / scale).double()
    pooled = ops.roi_align(input, rois, size, scale, ratio, aligned)
    expected = torch.from_numpy(loop_roi_align(input.detach(), rois, scale, size, ratio, aligned))
    assert_close(pooled, expected, torch.float64)
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    # Linear in the features: the gradient's product with other features is the pooled value of those.
    others = torch.randn_like(input)
    again = torch.from_numpy(loop_roi_align(others, rois, scale, size, ratio, aligned))
    assert_close((input.grad * others).sum(), (grad * again).sum(), torch.float64)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("sliced", [False, True])
def test_every_bit_equals_torchvision(monkeypatch, seed, sliced):
    if sliced:  # in threads
        monkeypatch.setattr(MODULE, "SLICE", 64)
    input, rois, scale, size = random_case(seed)
    ratio, aligned = RULES[seed % len(RULES)]
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    pooled = ops.roi_align(ours, rois, size, scale, ratio, aligned)
    if ratio <= 0 and aligned:  # inverted boxes pool zeros, where torchvision fails
        upright = (rois[:, 3:] > rois[:, 1:3]).all(1)
        assert not pooled[~upright].any()
        pooled, rois = pooled[upright], rois[upright]
    expected = torchvision.ops.roi_align(theirs, rois, size, scale, ratio, aligned)
    assert torch.equal(pooled, expected)
    grad = torch.randn(pooled.shape)
    pooled.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


def test_arguments_and_defaults_are_torchvisions():
    input, rois, *_ = random_case(3)
    assert torch.equal(ops.roi_align(input, rois, 3), torchvision.ops.roi_align(input, rois, 3))
    named = {"input": input, "boxes": rois, "output_size": (2, 3), "spatial_scale": 0.5}
    named |= {"sampling_ratio": 2, "aligned": True}
    assert torch.equal(ops.roi_align(**named), torchvision.ops.roi_align(**named))


@pytest.mark.parametrize("scales", [FOUR_LEVELS, FOUR_LEVELS[1:3], FOUR_LEVELS[1:2], (1 / 32, 1 / 32), (2.0, 1.0)])
@pytest.mark.parametrize("ratio", [2, -1])
def test_pyramids_equal_torchvisions(scales, ratio):
    side = 128
    levels = [torch.randn(2, 3, *(math.ceil(s * side * f) for f in (1.0, 1.5)), requires_grad=True) for s in scales]
    widest = 300.0 if scales[0] < 1 else 60.0
    per_image = [boxes_of_all_levels(40, widest), boxes_of_all_levels(25, widest)]
    theirs = MultiScaleRoIAlign([str(k) for k in range(len(scales))], (3, 2), ratio)
    expected = theirs({str(k): level for k, level in enumerate(levels)}, per_image, [(side, side * 3 // 2)] * 2)
    assert theirs.scales == list(scales)
    pooled = ops.multiscale_roi_align(levels, per_image, (3, 2), scales, ratio)
    assert torch.equal(pooled, expected)
    grad = torch.randn_like(pooled)
    actual, wanted = (torch.autograd.grad(x, levels, grad, materialize_grads=True) for x in (pooled, expected))
    assert all(map(torch.equal, actual, wanted))
    if scales == (1 / 32, 1 / 32):
        assert not actual[1].any(), "the second of two equal levels is never pooled from"
    elif len(scales) > 1:
        assert all(part.any() for part in actual), "every level is pooled from"


@pytest.mark.parametrize("canonical", [(224, 4), (56, 2), (300, 5), (16, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_at_the_very_edges_are_torchvisions(canonical, dtype):
    scales = [2.0**-k for k in range(-1, 8)]
    edges = _pyramid.level_edges(scales, *canonical, dtype=dtype)
    assert len(edges) == len(scales) - 1
    assert edges == sorted(edges)
    ideal = [(canonical[0] * 2.0 ** (k - canonical[1])) ** 2 for k in range(0, 8)]
    assert edges == pytest.approx(ideal, rel=1e-5)
    areas = torch.cat([areas_beside(edges, dtype), torch.rand(20_000, dtype=dtype) ** 6 * 1e7, torch.zeros(1)])
    boxes = torch.nn.functional.pad(areas[:, None].to(dtype), (2, 0))
    boxes = torch.cat([boxes, torch.ones_like(boxes[:, :1])], 1)
    expected = LevelMapper(-1, 7, *canonical)([boxes])
    assert torch.equal(_pyramid.assign_levels(torch.nn.functional.pad(boxes, (1, 0)), edges), expected)


def test_a_box_at_an_edge_is_pooled_from_torchvisions_level():
    levels = [torch.full((1, 1, 4, 4), float(k)) for k in range(4)]
    areas = areas_beside(_pyramid.level_edges(FOUR_LEVELS, 224, 4, dtype=torch.float32))
    boxes = torch.stack([torch.zeros_like(areas), torch.zeros_like(areas), areas, torch.ones_like(areas)], 1)
    boxes[:, :3:2] -= areas[:, None] / 2  # the one sample of a box lies in its middle
    pooled = ops.multiscale_roi_align(levels, [boxes], 1, FOUR_LEVELS, 1)
    theirs = MultiScaleRoIAlign(list("0123"), 1, 1)
    theirs.scales, theirs.map_levels = list(FOUR_LEVELS), LevelMapper(2, 5)
    expected = theirs(dict(zip("0123", levels, strict=True)), [boxes], [(16, 16)])
    assert torch.equal(pooled, expected)
    assert set(pooled.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_areas_count_without_their_sign_and_nan_as_nothing():
    nan, inf = float("nan"), float("inf")
    edges = _pyramid.level_edges(FOUR_LEVELS, 224, 4, dtype=torch.float32)
    corners = [
        [0, 0, -900, 900],
        [20, 900, 0, 0],
        [0, 0, nan, 9],
        [inf, 0, inf, 9],
        [0, 0, inf, 9],
        [900, 900, 0, 0],
        [0, 0, 0, 0],
    ]
    rois = torch.nn.functional.pad(torch.tensor(corners), (1, 0))
    assert _pyramid.assign_levels(rois, edges).tolist() == [3, 1, 0, 0, 3, 3, 0]


def test_gradcheck():
    levels = [torch.randn(2, 2, 6, 5).double().requires_grad_(), torch.randn(2, 2, 3, 3).double().requires_grad_()]
    rois = random_rois(7, 2, 12).double()
    pool = lambda *x: ops.multiscale_roi_align(x, rois, (3, 2), (0.5, 0.25), 2, True, 6, 2)  # noqa: E731
    assert torch.autograd.gradcheck(pool, tuple(levels))
    assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, (3, 2), 0.5), (levels[0],))
    assert torch.autograd.gradgradcheck(pool, tuple(levels))


def test_features_without_a_gradient():
    levels = [level.requires_grad_(k == 1) for k, level in enumerate(pyramid(1, 2, 8, 8, 2))]
    boxes = [boxes_of_all_levels(9, 32.0)]
    arguments = (3, (0.25, 0.125), 2, False, 32, 3)
    ops.multiscale_roi_align(levels, boxes, *arguments).sum().backward()
    assert levels[0].grad is None
    assert levels[1].grad.any()
    frozen = [level.detach() for level in levels]
    assert not ops.multiscale_roi_align(frozen, [boxes[0].requires_grad_()], *arguments).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    levels, boxes = pyramid(1, 3, 12, 12, 2), [boxes_of_all_levels(20, 48.0)]
    arguments = ((3, 2), (0.25, 0.125), 2, False, 32, 3)
    half = [level.to(dtype).requires_grad_() for level in levels]
    full = [level.detach().float().requires_grad_() for level in half]
    pooled, expected = (ops.multiscale_roi_align(x, boxes, *arguments) for x in (half, full))
    assert pooled.dtype == dtype
    assert torch.equal(pooled, expected.to(dtype))
    grad = torch.randn(pooled.shape).to(dtype)
    pooled.backward(grad)
    expected.backward(grad.float())
    assert all(torch.equal(here.grad, there.grad.to(dtype)) for here, there in zip(half, full, strict=True))
    narrow = [boxes[0].to(dtype)]
    wide = [narrow[0].float()]
    assert torch.equal(*(ops.multiscale_roi_align(half, each, *arguments) for each in (narrow, wide)))


def test_autocast_leaves_boxes_and_results_as_they_are():
    input, rois = torch.randn(1, 3, 9, 9), torch.tensor([[0, -4000.0, 1, 4000, 8], [0, 1, 1, 8, 8]])
    expected = ops.roi_align(input, rois, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.roi_align(input, rois, 2), expected)
        assert ops.roi_align(input.bfloat16(), rois, 2).dtype == torch.bfloat16


@pytest.mark.parametrize(("ratio", "aligned"), RULES)
def test_padding_pools_nothing_and_takes_no_gradient(ratio, aligned):
    input = torch.rand(2, 3, 7, 9, requires_grad=True)
    rois = awkward_rois()
    pooled = roi_align_of(input, rois, 1 / 16, (3, 2), ratio, aligned)
    assert pooled.isfinite().all()
    assert not pooled[:5].any()
    pooled[:5].sum().backward()
    assert not input.grad.any()
    regular = [6, 7, 9, 11, 12]
    expected = torchvision.ops.roi_align(input, rois[regular], (3, 2), 1 / 16, ratio, aligned)
    assert torch.equal(pooled[regular], expected)
    clamped = rois[5:6].clamp(-(2.0**24), 2.0**24)  # infinite: 2**20 cells to all sides
    assert torch.equal(pooled[5:6], roi_align_of(input, clamped, 1 / 16, (3, 2), ratio, aligned))


def roi_align_of(input: Tensor, rois: Tensor, scale: float, size: tuple[int, int], ratio: int, aligned: bool) -> Tensor:
    """Past the public function, which refuses images that do not exist."""
    return torch.ops.fastdet.roi_align(rois, [input], [scale], *size, ratio, aligned, 224.0, 4)


@pytest.mark.parametrize("aligned", [False, True])
def test_large_adaptive_boxes_equal_torchvision(monkeypatch, aligned):
    input, rois, scale, size = random_case(8)
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    monkeypatch.setattr(MODULE, "MAX_SAMPLES", 40)
    pooled = ops.roi_align(ours, rois, size, scale, -1, aligned)
    expected = torchvision.ops.roi_align(theirs, rois, size, scale, -1, aligned)
    assert_close(pooled, expected)
    assert not torch.equal(pooled, expected), "some of the boxes are large"
    grad = torch.randn(pooled.shape)
    pooled.backward(grad)
    expected.backward(grad)
    assert_close(ours.grad, theirs.grad)


def test_the_largest_boxes_cost_neither_memory_nor_time():
    input = torch.ones(1, 2, 6, 8, requires_grad=True)
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [0, -1e6, 2, 1e6, 4]])
    pooled = ops.roi_align(input, rois, (1, 1))
    side = 2.0**21
    assert_close(pooled[0].flatten(), torch.full((2,), 8 * 10 / side**2), torch.float64)
    assert_close(pooled[1].flatten(), torch.full((2,), 10 / 2e6))
    pooled[1].sum().backward()
    assert_close(input.grad[0, 0].sum(), torch.tensor(10 / 2e6))


@pytest.mark.parametrize(
    ("batch", "channels", "num_rois", "height"), [(0, 3, 0, 5), (2, 0, 4, 5), (2, 3, 0, 5), (1, 2, 3, 0)]
)
def test_empty_input(batch, channels, num_rois, height):
    levels = [torch.rand(batch, channels, height, 6, requires_grad=True) for _ in range(2)]
    rois = random_rois(num_rois, max(batch, 1), 6)
    pooled = ops.multiscale_roi_align(levels, rois, (2, 3), (1.0, 0.5))
    assert pooled.shape == (num_rois, channels, 2, 3)
    assert not pooled.any()
    pooled.sum().backward()
    for level in levels:
        assert level.grad.shape == level.shape
        assert not level.grad.any()
    assert ops.roi_align(levels[0], rois, 2).shape == (num_rois, channels, 2, 2)
    assert ops.roi_align(levels[0], [torch.zeros(0, 4)] * batch, 2).shape == (0, channels, 2, 2)
    batched = ops.batched_roi_align(levels, torch.zeros(batch, 0, 4), 2, (1.0, 0.5))
    assert batched.shape == (batch, 0, channels, 2, 2)


def test_lists_and_batches_are_the_same_boxes():
    levels, scales = pyramid(3, 2, 16, 16, 3), (1 / 4, 1 / 8, 1 / 16)
    boxes = boxes_of_all_levels(12, 64.0).reshape(3, 4, 4)
    rois = torch.cat([torch.arange(3.0).repeat_interleave(4)[:, None], boxes.reshape(12, 4)], 1)
    rules = {"sampling_ratio": 2, "aligned": True, "canonical_scale": 48, "canonical_level": 3}
    expected = ops.multiscale_roi_align(levels, rois, (3, 2), scales, **rules)
    assert torch.equal(ops.multiscale_roi_align(tuple(levels), list(boxes), (3, 2), scales, **rules), expected)
    batched = ops.batched_roi_align(levels, boxes, (3, 2), scales, **rules)
    assert torch.equal(batched, expected.reshape(3, 4, 2, 3, 2))
    valid = torch.rand(3, 4) < 0.5
    masked = ops.batched_roi_align(levels, boxes, (3, 2), scales, valid=valid, **rules)
    assert torch.equal(masked, batched * valid[:, :, None, None, None])
    double = ops.batched_roi_align([level.double() for level in levels], boxes, (3, 2), scales, **rules)
    assert double.dtype == torch.float64
    assert_close(double, batched)
    uneven = [boxes[0], boxes[1, :0], boxes[2, :1]]
    expected = torchvision.ops.roi_align(levels[0], uneven, 2, 0.25)
    assert torch.equal(ops.roi_align(levels[0], uneven, 2, 0.25), expected)


def test_operator_contract():
    levels = [level.requires_grad_() for level in pyramid(2, 3, 9, 10, 2)]
    rois = torch.nn.functional.pad(boxes_of_all_levels(8, 32.0), (1, 0))
    rules = (2, False, 24.0, 2)
    check_operator(torch.ops.fastdet.roi_align, rois, levels, [0.25, 0.125], 3, 2, *rules)
    grad = torch.randn(8, 3, 3, 2)
    sizes = [2, 3, 9, 10, 5, 5]
    check_operator(torch.ops.fastdet.roi_align_backward, grad, rois, sizes, [0.25, 0.125], *rules)
    joined = torch.cat([level.flatten() for level in levels])
    check_operator(torch.ops.fastdet.roi_align_joined, rois, joined, sizes, [0.25, 0.125], 3, 2, *rules)
    check_operator(torch.ops.fastdet.roi_align_backward_joined, grad, rois, sizes, [0.25, 0.125], *rules)


def test_compiles_with_gradients_into_one_graph_for_all_sizes():
    def loss(fine: Tensor, coarse: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        pooled = ops.batched_roi_align([fine, coarse], boxes, (3, 2), (0.5, 0.25), 2, False, valid, 10, 2)
        return pooled.square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, num_boxes, height in ((2, 3, 7), (3, 6, 9), (4, 2, 11)):
        boxes = boxes_of_all_levels(batch * num_boxes, 18.0).reshape(batch, num_boxes, 4)
        valid = torch.rand(batch, num_boxes) < 0.7
        eager = [torch.rand(batch, 5, height * 2, 8, requires_grad=True), torch.rand(batch, 5, height, 4)]
        traced = [level.detach().clone().requires_grad_(level.requires_grad) for level in eager]
        loss(*eager, boxes, valid).backward()
        compiled(*traced, boxes, valid).backward()
        assert torch.equal(eager[0].grad, traced[0].grad)
    assert counter.frame_count == 1


def test_on_a_gpu_results_are_channels_last_and_there_is_no_host_sync():
    with FakeTensorMode():
        levels = [torch.empty(2, 5, 7, 9, device="cuda", requires_grad=True), torch.empty(2, 5, 4, 5, device="cuda")]
        boxes, valid = torch.empty(2, 3, 4, device="cuda"), torch.empty(2, 3, dtype=torch.bool, device="cuda")
        pooled = ops.batched_roi_align(levels, boxes, (3, 2), (0.5, 0.25), valid=valid)
        assert pooled.shape == (2, 3, 5, 3, 2)
        assert pooled.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        rois = torch.empty(6, 5, device="cuda")
        pooled = ops.roi_align(levels[0], rois, 2)
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        sizes = [2, 5, 7, 9, 4, 5]
        grads = torch.ops.fastdet.roi_align_backward(pooled, rois, sizes, [0.5, 0.25], 2, False, 224.0, 4)
        assert [grad.shape for grad in grads] == [level.shape for level in levels]
        assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads)
        with pytest.raises(TypeError, match=r"input .*float64"):
            ops.roi_align(levels[0].double(), rois.double(), 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_work_in_the_callers_mode(monkeypatch, mode):
    monkeypatch.setattr(MODULE, "SLICE", 1 << 12)
    features, rois = torch.rand(1, 64, 20, 20), random_rois(20, 1, side=20.0)
    expected = torchvision.ops.roi_align(features, rois, 7)
    with mode():
        assert torch.equal(ops.roi_align(features, rois, 7), expected)


FEATURES, ROIS = torch.zeros(2, 3, 4, 4), torch.zeros(5, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((FEATURES[0], ROIS, 2), ValueError, r"input .* \[3, 4, 4\]"),
        ((FEATURES.int(), ROIS, 2), TypeError, "input .*int32"),
        ((FEATURES, ROIS[:, :4], 2), ValueError, r"boxes .*\[K, 5\], got \[5, 4\]"),
        ((FEATURES, ROIS[0], 2), ValueError, r"boxes .* \[5\]"),
        ((FEATURES, ROIS.int(), 2), TypeError, "boxes .*int32"),
        ((FEATURES, ROIS.to("meta"), 2), ValueError, "boxes is on meta"),
        ((FEATURES, ROIS * float("nan"), 2), ValueError, r"boxes\[0\] lies in image nan"),
        ((FEATURES, ROIS, (2, 0)), ValueError, "output_size"),
        ((FEATURES, ROIS, True), TypeError, "output_size .*True"),
        ((FEATURES, ROIS, 2, -1.0), ValueError, "spatial_scale"),
        ((FEATURES, ROIS, 2, float("nan")), ValueError, "spatial_scale"),
        ((FEATURES, ROIS, 2, float("inf")), ValueError, "spatial_scale .*inf"),
        ((FEATURES, [ROIS[:, 1:]], 2), ValueError, "boxes .* 1 for 2 images"),
        ((FEATURES, ROIS + 2, 2), ValueError, r"boxes\[0\] lies in image 2, but input"),
        ((FEATURES, ROIS, 0), ValueError, "output_size .* 0"),
        ((FEATURES, ROIS, 2, 0.0), ValueError, "spatial_scale"),
        ((FEATURES, ROIS, 2, 1.0, 2.0), TypeError, "sampling_ratio .*2.0"),
        ((FEATURES, ROIS, 2, 1.0, True), TypeError, "sampling_ratio .*True"),
        ((FEATURES, ROIS, 2, 1.0, None), TypeError, "sampling_ratio .*None"),
        ((FEATURES, ROIS, 2, 1.0, 2, 2), TypeError, "aligned .*2"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.roi_align(*arguments)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"features": FEATURES}, TypeError, "features must be a list.* Tensor"),
        ({"features": []}, ValueError, "features must hold 1 to 5 levels, got 0"),
        ({"features": [FEATURES] * 6}, ValueError, "features .*got 6"),
        ({"features": [FEATURES, FEATURES[0]]}, ValueError, r"features\[1\] .*\[3, 4, 4\]"),
        ({"features": [FEATURES, None]}, TypeError, r"features\[1\] .*NoneType"),
        ({"features": [FEATURES, FEATURES[:, :2]]}, ValueError, r"features\[1\] begins with \[2, 2\]"),
        ({"features": [FEATURES, FEATURES[:1]]}, ValueError, r"features\[1\] begins with \[1, 3\]"),
        ({"features": [FEATURES, FEATURES.half()]}, TypeError, r"features\[1\] is torch.float16"),
        ({"features": [FEATURES, FEATURES.to("meta")]}, ValueError, r"features\[1\] is on meta"),
        ({"scales": (0.5,)}, ValueError, "scales .*1 for 2"),
        ({"scales": (0.5, 0.25, 0.125)}, ValueError, "scales .*3 for 2"),
        ({"scales": 0.5}, TypeError, "scales .*0.5"),
        ({"scales": (0.5, None)}, TypeError, "scales"),
        ({"scales": (0.5, 0.0)}, ValueError, r"scales\[1\] .*0.0"),
        ({"scales": (0.5, -0.25)}, ValueError, r"scales\[1\]"),
        ({"scales": (float("nan"), 0.5)}, ValueError, r"scales\[0\]"),
        ({"scales": (0.25, 0.5)}, ValueError, "scales .*half"),
        ({"scales": (0.5, 0.125)}, ValueError, "scales .*half"),
        ({"scales": (0.6, 0.3)}, ValueError, "scales .*powers of two"),
        ({"boxes": ROIS + 2}, ValueError, r"boxes\[0\] lies in image 2, but features holds 2 images"),
        ({"boxes": ROIS.to("meta")}, ValueError, "boxes is on meta, but features is on cpu"),
        ({"boxes": [ROIS[:, 1:]]}, ValueError, "boxes .* 1 for 2 images"),
        ({"output_size": (2, -1)}, ValueError, "output_size"),
        ({"sampling_ratio": 1.5}, TypeError, "sampling_ratio"),
        ({"aligned": "yes"}, TypeError, "aligned"),
        ({"canonical_scale": 0}, ValueError, "canonical_scale"),
        ({"canonical_level": 4.0}, TypeError, "canonical_level"),
    ],
)
def test_bad_pyramids_name_the_argument(changed, error, words):
    arguments = {"features": [FEATURES, FEATURES], "boxes": ROIS, "output_size": 2, "scales": (0.5, 0.25)} | changed
    with pytest.raises(error, match=words):
        ops.multiscale_roi_align(**arguments)


@pytest.mark.parametrize(
    ("boxes", "valid", "error", "words"),
    [
        (torch.zeros(2, 4), None, ValueError, r"boxes .*\[B, S, 4\]"),
        (torch.zeros(3, 1, 4), None, ValueError, "boxes holds 3 images, but features holds 2"),
        (torch.zeros(2, 1, 4), torch.ones(2, 2).bool(), ValueError, r"valid .*\[2, 1\]"),
        (torch.zeros(2, 1, 4), torch.ones(2, 1), TypeError, "valid .*float32"),
        (torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool, device="meta"), ValueError, "valid is on meta"),
    ],
)
def test_bad_batches_name_the_argument(boxes, valid, error, words):
    with pytest.raises(error, match=words):
        ops.batched_roi_align([FEATURES], boxes, 2, (1.0,), valid=valid)


def tiles_of_bins(low: float, high: float, num_bins: int, ratio: int, aligned: bool, limit: int, tile: int) -> int:
    """How many tiles the bins along one axis reach, each counted for each bin."""
    used = 0
    for places in samples_by_definition(low, high, num_bins, ratio, aligned):
        if places and max(places) >= -1 and min(places) <= limit:
            first, last = (int(min(max(f(places), 0), limit - 1)) for f in (min, max))
            used += min(last + 1, limit - 1) // tile - first // tile + 1
    return used


def test_no_list_of_visits_outgrows_its_bound():
    kernel = pytest.importorskip("fastdet.kernels.roi_align_backward")
    longest = 0.0
    for limit, num_bins, ratio in itertools.product((1, 4, 5, 9, 40), (1, 2, 3, 7), (1, 2, 5, -1)):
        bound = kernel.visits_bound(1, ((limit, 1),), (1.0,), (), num_bins, 1)
        for low, high, aligned in itertools.product(range(-3, limit + 3), range(-3, limit + 3), (False, True)):
            used = tiles_of_bins(low * 1.01, high * 1.01, num_bins, ratio, aligned, limit, kernel.TILE)
            longest = max(longest, used / bound)
    assert 0.9 < longest <= 1.0, "nearly reached, and never passed"


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_area_of_a_level_bounds_the_visits(ratio, aligned):
    """Boxes of a level are narrow, low or small, inverted ones too."""
    kernel = pytest.importorskip("fastdet.kernels.roi_align_backward")
    sizes, scales, bins = ((60, 90), (30, 45)), (0.5, 0.25), (3, 2)
    edges = tuple(_pyramid.level_edges(scales, 40, 2, dtype=torch.float32))
    bound = kernel.visits_bound(1, sizes, scales, edges, *bins)
    assert bound < kernel.visits_bound(1, sizes[:1], scales[:1], (), *bins) / 2
    torch.manual_seed(0)
    sides = torch.exp2(torch.rand(1500, 2) * 8) * torch.randn(1500, 2).sign()
    corner = torch.rand(1500, 2) * torch.tensor([180.0, 120.0]) * (torch.rand(1500, 1) < 0.7)
    rois = torch.cat([torch.zeros(1500, 1), corner, corner + sides], 1)
    longest = 0
    for level, (_, x1, y1, x2, y2) in zip(
        _pyramid.assign_levels(rois, list(edges)).tolist(), rois.tolist(), strict=True
    ):
        rows, columns = (
            tiles_of_bins(low * scales[level], high * scales[level], num_bins, ratio, aligned, limit, kernel.TILE)
            for low, high, num_bins, limit in zip((y1, x1), (y2, x2), bins, sizes[level], strict=True)
        )
        longest = max(longest, rows * columns)
    assert 0.3 * bound < longest <= bound


@pytest.mark.parametrize(("channels", "expected"), [(512, (256, 2)), (200, (256, 2)), (100, (128, 1)), (1, (1, 1))])
def test_config(channels, expected):
    forward = pytest.importorskip("fastdet.kernels.roi_align")
    backward = pytest.importorskip("fastdet.kernels.roi_align_backward")
    for config in (forward.config(channels, itemsize=4), backward.config(channels)):
        assert (config.block_c, config.num_warps) == expected
    assert forward.config(channels, itemsize=2) == (expected[0], 1)


Case = tuple[str, list[Tensor], Tensor, list[float], tuple[int, int], tuple[int, bool, float, int]]


def kernel_cases() -> Iterator[Case]:
    """Maps of few cells: interpreted, each tile of four by four takes its time."""
    torch.manual_seed(0)
    canonical = (224.0, 4)
    boxes = torch.nn.functional.pad(boxes_of_all_levels(11, 36.0), (1, 0))
    boxes[::2, 0] = 1
    awkward = awkward_rois()
    halves = [2.0**-k for k in range(5)]
    yield "pyramid", pyramid(2, 5, 9, 7, 3), boxes, halves[2:], (2, 3), (2, False, 24.0, 3)
    yield "five levels", pyramid(1, 2, 7, 5, 5), boxes, halves, (1, 2), (1, True, 4.0, 1)
    yield "repeated level", [torch.randn(2, 3, 4, 5)] * 2, boxes, [0.125, 0.125], (2, 2), (2, False, *canonical)
    yield (
        "no cells",
        [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 0, 2)],
        boxes,
        halves[1:3],
        (2, 1),
        (2, False, 24.0, 2),
    )
    yield "adaptive", pyramid(2, 3, 6, 9, 2), boxes, halves[1:3], (2, 1), (-1, False, 24.0, 2)
    yield "adaptive, aligned", [torch.randn(2, 3, 5, 6)], random_rois(7, 2, 6), [1.0], (2, 3), (-1, True, *canonical)
    yield "three", [torch.randn(2, 3, 5, 6)], random_rois(6, 2, 12), [0.5], (3, 2), (3, False, *canonical)
    yield "one", [torch.randn(1, 1, 1, 1)], random_rois(2, 1, 1), [1.0], (1, 1), (2, False, *canonical)
    yield "blocks", [torch.randn(1, 300, 3, 4)], random_rois(3, 1, 8), [0.5], (2, 1), (2, False, *canonical)
    yield "many", [torch.randn(3, 2, 3, 3)], random_rois(131, 3, 10), [0.3], (1, 1), (1, False, *canonical)
    yield "awkward", [torch.randn(2, 4, 7, 9)], awkward, [1 / 16], (3, 2), (2, False, *canonical)
    yield "awkward, aligned", [torch.randn(2, 4, 7, 9)], awkward, [1 / 16], (1, 2), (2, True, *canonical)
    yield "awkward, adaptive", [torch.randn(2, 4, 3, 5)], awkward, [1 / 16], (1, 1), (0, False, *canonical)
    yield "awkward, middle", [torch.randn(2, 4, 3, 5)], awkward, [1 / 16], (1, 1), (1, False, *canonical)


CASES = {name: case for name, *case in kernel_cases()}


def sizes_of(levels: list[Tensor]) -> list[int]:
    return [*levels[0].shape[:2], *(side for level in levels for side in level.shape[2:])]


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_cpu(kernel_device, name):
    levels, rois, scales, size, rules = CASES[name]
    here = [level.to(kernel_device) for level in levels]
    expected = roi_align_cpu(rois, levels, scales, *size, *rules)
    pooled = roi_align_cuda(rois.to(kernel_device), here, scales, *size, *rules)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert_close(pooled.cpu(), expected)
    # Of more samples the compiler may change the order of a sum.
    if rules[0] in (1, 2):
        assert torch.equal(pooled.cpu(), expected)
    grad = torch.randn(expected.shape)
    arguments = (grad.to(kernel_device), rois.to(kernel_device), sizes_of(levels), scales, *rules)
    actual = roi_align_backward_cuda(*arguments)
    wanted = roi_align_backward_cpu(grad, rois, sizes_of(levels), scales, *rules)
    for part, whole in zip(actual, wanted, strict=True):
        assert part.is_contiguous(memory_format=torch.channels_last)
        assert_close(part.cpu(), whole)
    if name == "pyramid":
        assert all(part.any() for part in wanted), "every level is pooled from"
        assert all(map(torch.equal, actual, roi_align_backward_cuda(*arguments)))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision(kernel_device, dtype):
    levels, rois = [torch.randn(2, 20, 4, 5).to(dtype)], random_rois(5, 2, 10)
    rules = (2, False, 224.0, 4)
    expected = roi_align_cpu(rois, levels, [0.5], 3, 2, *rules)
    boxes = rois.to(kernel_device)
    pooled = roi_align_cuda(boxes, [levels[0].to(kernel_device)], [0.5], 3, 2, *rules)
    assert pooled.dtype == dtype
    assert_close(pooled.cpu(), expected, dtype)
    grad = torch.randn(expected.shape).to(dtype)
    (actual,) = roi_align_backward_cuda(grad.to(kernel_device), boxes, sizes_of(levels), [0.5], *rules)
    (wanted,) = roi_align_backward_cpu(grad, rois, sizes_of(levels), [0.5], *rules)
    assert actual.dtype == dtype
    assert_close(actual.cpu(), wanted, dtype)


@pytest.mark.kernel
def test_kernels_choose_the_level_at_the_very_edges(kernel_device):
    scales, rules = list(FOUR_LEVELS), (1, False, 224.0, 4)
    areas = areas_beside(_pyramid.level_edges(scales, 224, 4, dtype=torch.float32)).reshape(3, 81)[:, 38:43].flatten()
    zero = torch.zeros_like(areas)
    rois = torch.stack([zero, zero - areas / 2, zero, areas / 2, zero + 1], 1)
    levels = [torch.full((1, 1, 1, 1), float(k)) for k in range(4)]
    pooled = roi_align_cuda(rois.to(kernel_device), [level.to(kernel_device) for level in levels], scales, 1, 1, *rules)
    assert torch.equal(pooled.cpu(), roi_align_cpu(rois, levels, scales, 1, 1, *rules))
    assert set(pooled.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.kernel
def test_kernels_take_empty_and_strided_input(kernel_device):
    rules = (2, False, 224.0, 4)
    boxes = torch.zeros(0, 5, device=kernel_device)
    empty = roi_align_cuda(boxes, [torch.zeros(2, 3, 4, 5, device=kernel_device)], [1.0], 2, 2, *rules)
    assert empty.shape == (0, 3, 2, 2)
    assert not roi_align_backward_cuda(empty, boxes, [2, 3, 4, 5], [1.0], *rules)[0].any()
    rois = random_rois(4, 2, 5).to(kernel_device)
    input = torch.randn(2, 3, 4, 5).to(kernel_device)
    strided = input.transpose(1, 3).contiguous().transpose(1, 3)[:, :, ::2]
    expected = roi_align_cuda(rois, [input[:, :, ::2].contiguous()], [1.0], 2, 2, *rules)
    assert torch.equal(roi_align_cuda(rois.t().contiguous().t(), [strided], [1.0], 2, 2, *rules), expected)
    grad = torch.ones((), device=kernel_device).expand(expected.shape)
    both = [roi_align_backward_cuda(g, rois, [2, 3, 2, 5], [1.0], *rules)[0] for g in (grad, grad.contiguous())]
    assert torch.equal(*both)


@pytest.mark.cuda
@pytest.mark.parametrize("ratio", [2, -1])
def test_public_function_on_a_gpu_equals_the_cpu(ratio):
    here = [level.requires_grad_() for level in pyramid(2, 40, 50, 76, 4)]
    there = [level.detach().cuda().requires_grad_() for level in here]
    boxes = boxes_of_all_levels(200, 300.0).reshape(2, 100, 4)
    valid = torch.rand(2, 100) < 0.8
    expected = ops.batched_roi_align(here, boxes, 7, FOUR_LEVELS, ratio, valid=valid)
    actual = ops.batched_roi_align(there, boxes.cuda(), 7, FOUR_LEVELS, ratio, valid=valid.cuda())
    assert_close(actual.cpu(), expected)
    grad = torch.randn(expected.shape)
    expected.backward(grad)
    actual.backward(grad.cuda())
    for level, wanted in zip(there, here, strict=True):
        torch.testing.assert_close(level.grad.cpu(), wanted.grad, rtol=1e-4, atol=1e-4)
