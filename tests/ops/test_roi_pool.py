import itertools
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdet import ops
from fastdet.ops.cpu.threads import run_in_slices
from fastdet.ops.roi_pool import roi_pool_backward_cpu, roi_pool_backward_cuda, roi_pool_cpu, roi_pool_cuda
from tests.helpers.checks import check_operator

LOWEST = torch.finfo(torch.float32).min


def round_away(x: np.float32) -> int:
    return int(math.copysign(math.floor(abs(float(x)) + 0.5), x))


def bins_by_definition(low: np.float32, high: np.float32, scale: float, count: int, limit: int) -> list[range]:
    """The cells of each bin along one axis, each product and quotient in fp32."""
    start, end = (round_away(np.float32(x) * np.float32(scale)) for x in (low, high))
    step = np.float32(max(end - start + 1, 1)) / np.float32(count)
    edges = [(math.floor(np.float32(i) * step), math.ceil(np.float32(i + 1) * step)) for i in range(count)]
    return [range(*(min(max(edge + start, 0), limit) for edge in pair)) for pair in edges]


def loop_roi_pool(input: Tensor, rois: Tensor, scale: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pooled values and argmax, one cell after another."""
    _, channels, height, width = input.shape
    pooled = np.zeros((len(rois), channels, *size), np.float32)
    argmax = np.full(pooled.shape, -1, np.int32)
    features = input.numpy()
    for r, (image, x1, y1, x2, y2) in enumerate(rois.numpy()):
        rows = bins_by_definition(y1, y2, scale, size[0], height)
        columns = bins_by_definition(x1, x2, scale, size[1], width)
        for c, (i, ys), (j, xs) in itertools.product(range(channels), enumerate(rows), enumerate(columns)):
            cells = [(features[int(image), c, y, x], y * width + x) for y in ys for x in xs]
            if cells:
                pooled[r, c, i, j], argmax[r, c, i, j] = max(cells, key=lambda cell: cell[0])
    return torch.from_numpy(pooled), torch.from_numpy(argmax)


def loop_gradient(grad: Tensor, rois: Tensor, argmax: Tensor, shape: tuple[int, ...]) -> Tensor:
    total = np.zeros((*shape[:2], shape[2] * shape[3]), np.float32)
    for (r, c, i, j), cell in np.ndenumerate(argmax.numpy()):
        if cell >= 0:
            total[int(rois[r, 0]), c, cell] += grad[r, c, i, j].numpy()
    return torch.from_numpy(total).reshape(shape)


def random_rois(num_rois: int, batch: int, side: float) -> Tensor:
    """Of all sizes; some stick out of a square of `side` pixels, lie outside it, or are inverted."""
    center = (torch.rand(num_rois, 2) * 1.4 - 0.2) * side
    half = torch.rand(num_rois, 2) ** 2 * side * 0.7 - 0.03 * side
    image = torch.randint(batch, (num_rois, 1)).float()
    rois = torch.cat([image, center - half, center + half], 1)
    rois[::3] = rois[::3].round()  # corners on half a cell, where the direction of rounding shows
    return rois


def random_case(seed: int) -> tuple[Tensor, Tensor, float, tuple[int, int]]:
    torch.manual_seed(seed)
    batch, channels, height, width = (int(torch.randint(1, n, ())) for n in (4, 9, 22, 22))
    scale = (1.0, 0.5, 1 / 16, 0.3, 2.7)[seed % 5]
    size = ((7, 7), (1, 1), (3, 5), (6, 2), (14, 14))[seed // 5 % 5]
    input = torch.randn(batch, channels, height, width)
    if seed % 2:
        input = (input * 2).round()  # ties
    if seed % 3 == 1:
        input = input.contiguous(memory_format=torch.channels_last)
    if seed % 3 == 2:
        input = input.transpose(2, 3).contiguous().transpose(2, 3)
    return input, random_rois(int(torch.randint(1, 40, ())), batch, max(height, width) / scale), scale, size


def torchvision_roi_pool(input: Tensor, rois: Tensor, scale: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.ops.torchvision.roi_pool(input, rois, scale, *size)


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
        ]
    )


@pytest.mark.parametrize(
    ("shape", "scale", "size"),
    [((2, 3, 6, 9), 1 / 16, (7, 7)), ((1, 2, 11, 5), 0.5, (2, 3)), ((3, 1, 1, 1), 1.0, (1, 1))],
)
def test_values_argmax_and_gradient_equal_a_loop(shape, scale, size):
    input = torch.randn(shape).mul(2).round().div(2).requires_grad_()
    rois = random_rois(15, shape[0], max(shape[2:]) / scale)
    pooled = ops.roi_pool(input, rois, size, scale)
    expected, expected_argmax = loop_roi_pool(input.detach(), rois, scale, size)
    assert torch.equal(pooled, expected)
    assert torch.equal(torch.ops.fastdet.roi_pool(input, rois, scale, *size)[1], expected_argmax)
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    assert torch.equal(input.grad, loop_gradient(grad, rois, expected_argmax, shape))


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("sliced", [False, True])
def test_every_bit_equals_torchvision(monkeypatch, seed, sliced):
    if sliced:  # in threads
        monkeypatch.setattr(sys.modules[roi_pool_cpu.__module__], "SLICE", 64)
    input, rois, scale, size = random_case(seed)
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    pooled, argmax = torch.ops.fastdet.roi_pool(ours, rois, scale, *size)
    expected, expected_argmax = torchvision_roi_pool(theirs, rois, scale, size)
    assert torch.equal(pooled, expected)
    assert torch.equal(argmax, expected_argmax)
    assert torch.equal(ops.roi_pool(input, rois, size, scale), torchvision.ops.roi_pool(input, rois, size, scale))
    grad = torch.randn(pooled.shape)
    pooled.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


def test_expanded_gradients_and_features_without_any():
    input, rois, scale, size = random_case(3)
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    ops.roi_pool(ours, rois, size, scale).sum().backward()
    torchvision.ops.roi_pool(theirs, rois, size, scale).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert not ops.roi_pool(input, rois.requires_grad_(), size, scale).requires_grad


def test_nan_and_infinite_features_as_in_torchvision():
    input, rois, scale, size = random_case(10)
    input[:, ::2][torch.rand_like(input[:, ::2]) < 0.4] = float("nan")
    input[:, 1::2][torch.rand_like(input[:, 1::2]) < 0.4] = -float("inf")
    actual = torch.ops.fastdet.roi_pool(input, rois, scale, *size)
    expected = torchvision_roi_pool(input, rois, scale, size)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert (actual[0] == LOWEST).any(), "a bin of nothing but NaN is part of the case"


def test_gradcheck():
    input = torch.randperm(2 * 2 * 6 * 5).reshape(2, 2, 6, 5).double().requires_grad_()
    rois = random_rois(5, 2, 12).double()
    assert torch.autograd.gradcheck(lambda x: ops.roi_pool(x, rois, (3, 2), 0.5), (input,))
    assert torch.autograd.gradgradcheck(lambda x: ops.roi_pool(x, rois, (3, 2), 0.5), (input,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    input, rois, scale, size = random_case(4)
    half, full = (input.to(dtype).to(kind).requires_grad_() for kind in (dtype, torch.float32))
    pooled, expected = (ops.roi_pool(x, rois, size, scale) for x in (half, full))
    assert pooled.dtype == dtype
    assert torch.equal(pooled.float(), expected)
    grad = torch.randn(pooled.shape).to(dtype)
    pooled.backward(grad)
    expected.backward(grad.float())
    assert torch.equal(half.grad, full.grad.to(dtype))
    narrow = rois.to(dtype)
    assert torch.equal(ops.roi_pool(half, narrow, 2, scale), ops.roi_pool(half, narrow.float(), 2, scale))


def test_padding_pools_nothing_and_takes_no_gradient():
    input = torch.rand(2, 3, 7, 9, requires_grad=True)
    rois = awkward_rois()
    pooled, argmax = torch.ops.fastdet.roi_pool(input, rois, 1 / 16, 3, 2)
    assert (pooled[:5] == 0).all()
    assert (argmax[:5] == -1).all()
    pooled[:5].sum().backward()
    assert (input.grad == 0).all()
    assert torch.equal(pooled[6:8], torchvision.ops.roi_pool(input, rois[6:8], (3, 2), 1 / 16))
    assert (pooled[8:10] == 0).all()
    pooled, _ = torch.ops.fastdet.roi_pool(input, rois[5:6], 1 / 16, 1, 1)  # infinite: all of the map
    assert torch.equal(pooled[0, :, 0, 0], input[1].flatten(1).max(1).values)


@pytest.mark.parametrize(
    ("batch", "channels", "num_rois", "height"), [(0, 3, 0, 5), (2, 0, 4, 5), (2, 3, 0, 5), (1, 2, 3, 0), (2, 0, 0, 0)]
)
def test_empty_input(batch, channels, num_rois, height):
    input = torch.rand(batch, channels, height, 6, requires_grad=True)
    pooled = ops.roi_pool(input, random_rois(num_rois, max(batch, 1), 6), (2, 3))
    assert pooled.shape == (num_rois, channels, 2, 3)
    assert (pooled == 0).all()
    pooled.sum().backward()
    assert input.grad.shape == input.shape
    assert (input.grad == 0).all()
    assert ops.roi_pool(input, [torch.zeros(0, 4)] * batch, 2).shape == (0, channels, 2, 2)
    assert ops.batched_roi_pool(input, torch.zeros(batch, 0, 4), 2, 1.0).shape == (batch, 0, channels, 2, 2)


def test_lists_and_batches_are_the_same_boxes():
    input = torch.rand(3, 2, 8, 8)
    boxes = random_rois(12, 1, 16)[:, 1:].reshape(3, 4, 4)
    rois = torch.cat([torch.arange(3.0).repeat_interleave(4)[:, None], boxes.reshape(12, 4)], 1)
    expected = ops.roi_pool(input, rois, (3, 2), 0.5)
    assert torch.equal(ops.roi_pool(input, list(boxes), (3, 2), 0.5), expected)
    uneven = [boxes[0], boxes[1, :0], boxes[2, :1]]
    assert torch.equal(ops.roi_pool(input, uneven, 2, 0.5), torchvision.ops.roi_pool(input, uneven, 2, 0.5))
    batched = ops.batched_roi_pool(input, boxes, (3, 2), 0.5)
    assert torch.equal(batched, expected.reshape(3, 4, 2, 3, 2))
    valid = torch.rand(3, 4) < 0.5
    masked = ops.batched_roi_pool(input, boxes, (3, 2), 0.5, valid)
    assert torch.equal(masked, batched * valid[:, :, None, None, None])
    double = ops.batched_roi_pool(input.double(), boxes, (3, 2), 0.5)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), batched)


def test_operator_contract():
    input, rois, scale, size = random_case(7)
    check_operator(torch.ops.fastdet.roi_pool, input.clone().requires_grad_(), rois, scale, *size)
    pooled, argmax = torch.ops.fastdet.roi_pool(input, rois, scale, *size)
    arguments = (torch.randn_like(pooled), rois, argmax, scale, *size, *input.shape)
    check_operator(torch.ops.fastdet.roi_pool_backward, *arguments)


def test_compiles_with_gradients_into_one_graph_for_all_sizes():
    def loss(input: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        return ops.batched_roi_pool(input, boxes, (3, 2), 0.5, valid).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, num_boxes, height in ((2, 3, 7), (3, 6, 9), (4, 2, 11)):
        boxes = random_rois(batch * num_boxes, 1, 18)[:, 1:].reshape(batch, num_boxes, 4)
        valid = torch.rand(batch, num_boxes) < 0.7
        eager, traced = (torch.rand(batch, 5, height, 8) for _ in range(2))
        traced.copy_(eager)
        loss(eager.requires_grad_(), boxes, valid).backward()
        compiled(traced.requires_grad_(), boxes, valid).backward()
        assert torch.equal(eager.grad, traced.grad)
    assert counter.frame_count == 1


def test_on_a_gpu_results_are_channels_last_and_there_is_no_host_sync():
    with FakeTensorMode():
        input = torch.empty(2, 5, 7, 9, device="cuda", requires_grad=True)
        boxes, valid = torch.empty(2, 3, 4, device="cuda"), torch.empty(2, 3, dtype=torch.bool, device="cuda")
        pooled = ops.batched_roi_pool(input, boxes, (3, 2), 0.5, valid)
        assert pooled.shape == (2, 3, 5, 3, 2)
        assert pooled.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        rois = torch.empty(6, 5, device="cuda")
        assert ops.roi_pool(input, rois, 2).is_contiguous(memory_format=torch.channels_last)
        pooled, argmax = torch.ops.fastdet.roi_pool(input, rois, 0.5, 3, 2)
        assert argmax.dtype == torch.int16
        assert argmax.is_contiguous(memory_format=torch.channels_last)
        grad = torch.ops.fastdet.roi_pool_backward(pooled, rois, argmax, 0.5, 3, 2, 2, 5, 7, 9)
        assert grad.is_contiguous(memory_format=torch.channels_last)
        with pytest.raises(TypeError, match=r"input .*float64"):
            ops.roi_pool(input.double(), rois.double(), 2)


FEATURES, ROIS = torch.zeros(2, 3, 4, 4), torch.zeros(5, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((FEATURES[0], ROIS, 2), ValueError, r"input .* \[3, 4, 4\]"),
        ((FEATURES.int(), ROIS, 2), TypeError, "input .*int32"),
        ((None, ROIS, 2), TypeError, "input .*NoneType"),
        ((FEATURES, ROIS[:, :4], 2), ValueError, r"boxes .*\[K, 5\], got \[5, 4\]"),
        ((FEATURES, ROIS[0], 2), ValueError, r"boxes .* \[5\]"),
        ((FEATURES, ROIS.int(), 2), TypeError, "boxes .*int32"),
        ((FEATURES, None, 2), TypeError, "boxes .*NoneType"),
        ((FEATURES, ROIS.to("meta"), 2), ValueError, "boxes is on meta"),
        ((FEATURES, [ROIS[:, 1:]], 2), ValueError, "boxes .* 1 for 2 images"),
        ((FEATURES, [ROIS[:, 1:], ROIS], 2), ValueError, r"boxes\[1\] .*\[L, 4\], got \[5, 5\]"),
        ((FEATURES, [ROIS[:, 1:], None], 2), TypeError, r"boxes\[1\] .*NoneType"),
        ((FEATURES, torch.cat([ROIS, ROIS[:1] + 2]), 2), ValueError, r"boxes\[5\] lies in image 2, .* 2 images"),
        ((FEATURES, ROIS - 1, 2), ValueError, r"boxes\[0\] lies in image -1"),
        ((FEATURES, ROIS * float("nan"), 2), ValueError, r"boxes\[0\] lies in image nan"),
        ((FEATURES, ROIS, 0), ValueError, "output_size .* 0"),
        ((FEATURES, ROIS, (2, -1)), ValueError, "output_size"),
        ((FEATURES, ROIS, (2, 2, 2)), ValueError, "output_size"),
        ((FEATURES, ROIS, ()), ValueError, "output_size"),
        ((FEATURES, ROIS, 2.0), TypeError, "output_size"),
        ((FEATURES, ROIS, True), TypeError, "output_size .*True"),
        ((FEATURES, ROIS, "22"), TypeError, "output_size .*'22'"),
        ((FEATURES, ROIS, 2, 0.0), ValueError, "spatial_scale"),
        ((FEATURES, ROIS + 0.5, 2), ValueError, r"boxes\[0\] lies in image 0.5"),
        ((FEATURES, ROIS, 2, None), TypeError, "spatial_scale .*None"),
        ((FEATURES, ROIS, 2, -1.0), ValueError, "spatial_scale"),
        ((FEATURES, ROIS, 2, float("nan")), ValueError, "spatial_scale"),
        ((FEATURES, ROIS, 2, float("inf")), ValueError, "spatial_scale .*inf"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.roi_pool(*arguments)


@pytest.mark.parametrize(
    ("boxes", "valid", "error", "words"),
    [
        (torch.zeros(2, 4), None, ValueError, r"boxes .*\[B, S, 4\]"),
        (torch.zeros(3, 1, 4), None, ValueError, "boxes holds 3 images"),
        (torch.zeros(2, 1, 4), torch.ones(2, 2).bool(), ValueError, r"valid .*\[2, 1\]"),
        (torch.zeros(2, 1, 4), torch.ones(2, 1), TypeError, "valid .*float32"),
        (torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool, device="meta"), ValueError, "valid is on meta"),
    ],
)
def test_bad_batches_name_the_argument(boxes, valid, error, words):
    with pytest.raises(error, match=words):
        ops.batched_roi_pool(FEATURES, boxes, 2, 1.0, valid)


def test_no_list_of_visits_outgrows_its_bound():
    kernel = pytest.importorskip("fastdet.kernels.roi_pool")
    longest = 0.0
    for height, count in itertools.product((1, 2, 5, 9), (1, 2, 3, 7, 14)):
        bound = kernel.visits_bound(1, height, 1, count, 1)
        for first, last in itertools.product(range(-12, 12), range(-12, 24)):
            bins = bins_by_definition(np.float32(first), np.float32(last), 1.0, count, height)
            used = sum(len({cell // kernel.TILE for cell in cells}) for cells in bins)
            longest = max(longest, used / bound)
    assert longest == 1.0, "reached, and never passed"


def test_compiles_with_a_scale_that_changes():
    torch._dynamo.reset()
    features, rois = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 1.0, 1.0, 9.0, 7.0]])
    compiled = torch.compile(lambda scale: ops.roi_pool(features, rois, 2, scale), backend="aot_eager", fullgraph=True)
    for scale in (0.5, 0.25, 0.75):
        assert torch.equal(compiled(scale), ops.roi_pool(features, rois, 2, scale))


def test_workers_start_no_threads_of_their_own():
    """A team of each would be more threads than cores, after which OpenMP is slow in the whole process."""
    before, threads = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        run_in_slices(2, 1, 1, lambda first, last: threads.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 2


@pytest.mark.parametrize(
    ("channels", "forward", "backward"),
    [(512, (256, 1), (256, 4)), (200, (256, 1), (256, 4)), (100, (128, 1), (128, 2)), (1, (1, 1), (1, 1))],
)
def test_config(channels, forward, backward):
    kernel = pytest.importorskip("fastdet.kernels.roi_pool")
    for config, expected in ((kernel.config(channels), forward), (kernel.config_backward(channels), backward)):
        assert (config.block_c, config.num_warps) == expected


def kernel_cases() -> Iterator[tuple[str, Tensor, Tensor, float, tuple[int, int]]]:
    torch.manual_seed(0)
    nan_features = torch.randn(2, 3, 5, 7)
    nan_features[torch.rand_like(nan_features) < 0.5] = float("nan")
    yield "odd", torch.randn(2, 5, 5, 7), random_rois(7, 2, 112), 1 / 16, (7, 3)
    yield "one", torch.randn(1, 1, 1, 1), random_rois(1, 1, 1), 1.0, (1, 1)
    yield "blocks", torch.randn(1, 300, 3, 4), random_rois(4, 1, 8), 0.5, (2, 3)
    yield "many", torch.randn(3, 2, 3, 3), random_rois(131, 3, 10), 0.3, (2, 1)
    yield "ties", torch.ones(2, 3, 6, 6), random_rois(9, 2, 6), 1.0, (3, 3)
    yield "nan", nan_features, random_rois(9, 2, 14), 0.5, (2, 2)
    yield "awkward", torch.randn(2, 4, 7, 9), awkward_rois(), 1 / 16, (3, 2)
    yield "narrow", torch.randn(2, 4, 1, 9), random_rois(7, 2, 9), 1.0, (7, 1)


CASES = {name: case for name, *case in kernel_cases()}


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_cpu(kernel_device, name):
    input, rois, scale, size = CASES[name]
    features, boxes = input.to(kernel_device), rois.to(kernel_device)
    expected, expected_argmax = roi_pool_cpu(input, rois, scale, *size)
    pooled, argmax = roi_pool_cuda(features, boxes, scale, *size)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pooled.cpu(), expected)
    assert argmax.dtype == torch.int16
    assert torch.equal(argmax.cpu(), expected_argmax)
    grad = torch.randn(expected.shape)
    arguments = (grad.to(kernel_device), boxes, argmax, scale, *size, *input.shape)
    actual = roi_pool_backward_cuda(*arguments)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual.cpu(), roi_pool_backward_cpu(grad, rois, expected_argmax, scale, *size, *input.shape))
    if name == "odd":
        assert torch.equal(roi_pool_backward_cuda(*arguments), actual)
        wide = (*arguments[:2], argmax.int(), *arguments[3:])
        assert torch.equal(roi_pool_backward_cuda(*wide), actual)


@pytest.mark.kernel
@pytest.mark.parametrize(("width", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_argmax_holds_the_last_cell_of_a_map(kernel_device, width, dtype):
    input = torch.zeros(1, 2, 1, width, device=kernel_device)
    input[..., -1] = 1
    rois = torch.tensor([[0.0, width - 4, 0, width - 1, 0]], device=kernel_device)
    pooled, argmax = roi_pool_cuda(input, rois, 1.0, 1, 1)
    assert (pooled == 1).all()
    assert argmax.dtype == dtype
    assert (argmax == width - 1).all()
    with FakeTensorMode():
        fake = torch.empty(1, 2, 1, width, device="cuda"), torch.empty(1, 5, device="cuda")
        assert torch.ops.fastdet.roi_pool(*fake, 1.0, 1, 1)[1].dtype == dtype


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["sorted", "mixed", "only the last image", "padding alone"])
def test_gradient_with_rois_in_any_order(monkeypatch, kernel_device, order):
    visits = pytest.importorskip("fastdet.kernels.common.csr")
    monkeypatch.setattr(visits, "BLOCK_R", 4)  # several blocks of RoIs, and of images
    monkeypatch.setattr(visits, "BLOCK_EXTENT", 4)
    torch.manual_seed(1)
    input, rois = torch.randn(6, 2, 2, 3), random_rois(21, 6, 4)
    if order == "sorted":
        rois = rois[rois[:, 0].argsort()]
    elif order == "mixed":
        rois[::5, 0] = -1
    else:
        rois[:, 0] = 5 if order == "only the last image" else 6
    expected, expected_argmax = roi_pool_cpu(input, rois, 1.0, 2, 1)
    grad = torch.randn(expected.shape)
    boxes = rois.to(kernel_device)
    _, argmax = roi_pool_cuda(input.to(kernel_device), boxes, 1.0, 2, 1)
    actual = roi_pool_backward_cuda(grad.to(kernel_device), boxes, argmax, 1.0, 2, 1, *input.shape)
    assert torch.equal(actual.cpu(), roi_pool_backward_cpu(grad, rois, expected_argmax, 1.0, 2, 1, *input.shape))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision(kernel_device, dtype):
    input, rois, scale, size = torch.randn(2, 20, 4, 5).to(dtype), random_rois(9, 2, 10), 0.5, (3, 2)
    expected, expected_argmax = roi_pool_cpu(input, rois, scale, *size)
    boxes = rois.to(kernel_device)
    pooled, argmax = roi_pool_cuda(input.to(kernel_device), boxes, scale, *size)
    assert torch.equal(pooled.cpu(), expected)
    assert torch.equal(argmax.cpu().int(), expected_argmax)
    grad = torch.randn(expected.shape).to(dtype)
    actual = roi_pool_backward_cuda(grad.to(kernel_device), boxes, argmax, scale, *size, *input.shape)
    assert actual.dtype == dtype
    gradient = roi_pool_backward_cpu(grad.float(), rois, expected_argmax, scale, *size, *input.shape)
    # The interpreter truncates where the GPU rounds.
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        gradient = (gradient.view(torch.int32) & -(1 << 16)).view(torch.float32)
    assert torch.equal(actual.cpu(), gradient.to(dtype))


@pytest.mark.kernel
def test_kernels_take_empty_and_strided_input(kernel_device):
    empty = roi_pool_cuda(
        torch.zeros(2, 3, 4, 5, device=kernel_device), torch.zeros(0, 5, device=kernel_device), 1.0, 2, 2
    )
    assert [tuple(part.shape) for part in empty] == [(0, 3, 2, 2)] * 2
    boxes = torch.zeros(0, 5, device=kernel_device)
    assert (roi_pool_backward_cuda(empty[0], boxes, empty[1], 1.0, 2, 2, 2, 3, 4, 5) == 0).all()
    rois = random_rois(4, 2, 5).to(kernel_device)
    input = torch.randn(2, 3, 4, 5).to(kernel_device)
    strided = input.transpose(1, 3).contiguous().transpose(1, 3)[:, :, ::2]
    expected = roi_pool_cuda(input[:, :, ::2].contiguous(), rois.contiguous(), 1.0, 2, 2)
    actual = roi_pool_cuda(strided, rois.t().contiguous().t(), 1.0, 2, 2)
    assert torch.equal(actual[0], expected[0])
    grad = torch.ones((), device=kernel_device).expand(expected[0].shape)
    both = [roi_pool_backward_cuda(g, rois, expected[1], 1.0, 2, 2, 2, 3, 2, 5) for g in (grad, grad.contiguous())]
    assert torch.equal(*both)


@pytest.mark.cuda
def test_public_function_on_a_gpu_equals_the_cpu():
    input, rois, scale, size = random_case(8)
    here, there = input.clone().requires_grad_(), input.cuda().requires_grad_()
    rois = torch.cat([rois, awkward_rois()[6:8]])
    expected, actual = ops.roi_pool(here, rois, size, scale), ops.roi_pool(there, rois.cuda(), size, scale)
    assert torch.equal(actual.cpu(), expected)
    grad = torch.randn(expected.shape)
    expected.backward(grad)
    actual.backward(grad.cuda())
    assert torch.equal(there.grad.cpu(), here.grad)
    outside = torch.tensor([[9.0, 0, 0, 4, 4]], device="cuda")
    assert (ops.roi_pool(there, outside, size, scale) == 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_work_in_the_callers_mode(mode):
    features, rois = torch.rand(1, 64, 20, 20), random_rois(200, 1, side=20.0)
    expected, _ = torch.ops.torchvision.roi_pool(features, rois, 1.0, 7, 7)
    with mode():
        assert torch.equal(ops.roi_pool(features, rois, 7), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_threads_work_in_a_forked_process(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(sys.modules[roi_pool_cpu.__module__], "SLICE", 64)
    features, rois = torch.rand(1, 2, 9, 9), random_rois(20, 1, side=9.0)
    expected = ops.roi_pool(features, rois, 2)  # this process has its threads from here on

    process = multiprocessing.get_context("fork").Process(target=_pool_again, args=(features, rois, expected))
    process.start()
    process.join(60)
    hung = process.is_alive()
    process.kill()
    assert not hung
    assert process.exitcode == 0


def _pool_again(features: Tensor, rois: Tensor, expected: Tensor) -> None:
    os._exit(0 if torch.equal(ops.roi_pool(features, rois, 2), expected) else 1)
