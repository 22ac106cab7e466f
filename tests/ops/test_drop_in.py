"""Every operation with torchvision's name beside torchvision's, in the ways in which both are called."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torchvision import tv_tensors

from fastdet import ops

theirs = torchvision.ops
FEATURES = torch.rand(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16)
MIXED = list(itertools.permutations(FLOATS, 2))
# Both compute in fp32, and round half precision once at the end.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def boxes_of(count: int, side: float = 40.0) -> Tensor:
    corner = torch.rand(count, 2) * side
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * side * 0.6], 1)


def rois_of(count: int, batch: int = 2, side: float = 40.0) -> Tensor:
    return torch.cat([torch.randint(batch, (count, 1)).float(), boxes_of(count, side)], 1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


POOLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "roi_pool": (ops.roi_pool, theirs.roi_pool),
    "roi_align": (ops.roi_align, theirs.roi_align),
    "roi_align aligned": (
        lambda *a, **k: ops.roi_align(*a, aligned=True, sampling_ratio=2, **k),
        lambda *a, **k: theirs.roi_align(*a, aligned=True, sampling_ratio=2, **k),
    ),
}


@pytest.mark.parametrize("name", POOLS)
class TestPooling:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("change", [lambda x: x, strided, lambda x: x.to(memory_format=torch.channels_last)])
    def test_values_and_gradients(self, name, dtype, batch, change):
        ours, reference = POOLS[name]
        features, rois = torch.randn(batch, 4, 10, 12).to(dtype), rois_of(7, batch).to(dtype)
        inputs = [change(features).detach().requires_grad_() for _ in range(2)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = ours(inputs[0], strided(rois), (3, 2), 0.25)
        # torchvision computes half precision in half precision, where it takes it on the CPU at all.
        expected = reference(inputs[1].to(wide), rois.to(wide), (3, 2), 0.25).to(dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        weight = torch.randn(found.shape).to(dtype)
        gradients = [torch.autograd.grad(out, x, weight)[0] for out, x in zip((found, expected), inputs, strict=True)]
        assert torch.equal(*gradients)

    @pytest.mark.parametrize(("first", "second"), MIXED)
    def test_mixed_dtypes_are_those_of_the_wider(self, name, first, second):
        features, rois = torch.randn(2, 3, 8, 9).to(first), rois_of(6).to(second)
        found = POOLS[name][0](features, rois, 3, 0.25)
        wide = POOLS[name][1](features.double(), rois.double(), 3, 0.25)
        assert found.dtype == first
        torch.testing.assert_close(found.double(), wide, rtol=TOLERANCE[first], atol=max(TOLERANCE[first], 1e-5))

    def test_lists_of_boxes_and_nothing(self, name):
        ours, reference = POOLS[name]
        features, lists = torch.randn(2, 3, 8, 9), [boxes_of(3), boxes_of(0)]
        assert torch.equal(ours(features, lists, 2, 0.25), reference(features, lists, 2, 0.25))
        assert ours(features, torch.zeros(0, 5), (2, 3)).shape == (0, 3, 2, 3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, name, dtype):
        features, rois = torch.randn(2, 3, 8, 9), rois_of(5).to(dtype)
        with torch.autocast("cpu", dtype):
            found = POOLS[name][0](features, rois, 3, 0.25)
        assert torch.equal(found, POOLS[name][1](features, rois.float(), 3, 0.25))

    def test_trace_compile_export_and_fx(self, name):
        function = POOLS[name][0]

        class Pool(nn.Module):
            def forward(self, features: Tensor, rois: Tensor) -> Tensor:
                return function(features, rois, (3, 2), 0.25)

        check_in_all_ways(Pool(), *((torch.randn(2, 3, 8, 9), rois_of(count)) for count in (5, 9)))


IOUS = {
    "box_iou": (ops.box_iou, theirs.box_iou),
    "generalized_box_iou": (ops.generalized_box_iou, theirs.generalized_box_iou),
    "distance_box_iou": (ops.distance_box_iou, theirs.distance_box_iou),
    "complete_box_iou": (ops.complete_box_iou, theirs.complete_box_iou),
}


@pytest.mark.parametrize("name", IOUS)
class TestIoU:
    @pytest.mark.parametrize(("first", "second"), [*((d, d) for d in FLOATS), *MIXED])
    @pytest.mark.parametrize("count", [3, 200])
    def test_dtypes(self, name, first, second, count):
        ours, reference = IOUS[name]
        boxes1, boxes2 = strided(boxes_of(count)).to(first), boxes_of(170).to(second)
        found = ours(boxes1, boxes2)
        wide = torch.float64 if torch.float64 in (first, second) else torch.float32
        assert found.dtype == wide
        torch.testing.assert_close(found, reference(boxes1.to(wide), boxes2.to(wide)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", WHOLE)
    def test_whole_numbers(self, name, dtype):
        ours, reference = IOUS[name]
        boxes1, boxes2 = boxes_of(6).to(dtype), boxes_of(5).to(dtype)
        torch.testing.assert_close(ours(boxes1, boxes2), reference(boxes1, boxes2).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(boxes1, boxes2.float()), ours(boxes1, boxes2))

    def test_leading_dimensions_broadcast(self, name):
        ours, reference = IOUS[name]
        boxes1, boxes2 = boxes_of(12).reshape(2, 1, 6, 4), boxes_of(15).reshape(3, 5, 4)
        found = ours(boxes1, boxes2)
        assert found.shape == (2, 3, 6, 5)
        for i, j in itertools.product(range(2), range(3)):
            torch.testing.assert_close(found[i, j], reference(boxes1[i, 0], boxes2[j]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("count", [30, 300])
    def test_inverted_boxes(self, name, count):
        """Their generalized IoU is at most the IoU, which torchvision's exceeds."""
        ours, reference = IOUS[name]
        boxes1, boxes2 = boxes_of(count), boxes_of(200)
        for inverted in (boxes1[:, [2, 3, 0, 1]], boxes1[:, [2, 1, 0, 3]], boxes1[:, [0, 3, 2, 1]]):
            for first, second in ((inverted, boxes2), (boxes2, inverted)):
                expected = reference(first, second)
                if name == "generalized_box_iou":
                    expected = expected.nan_to_num(torch.inf).minimum(theirs.box_iou(first, second))
                torch.testing.assert_close(ours(first, second), expected, rtol=1e-4, atol=1e-5)

    def test_nothing(self, name):
        assert IOUS[name][0](torch.zeros(0, 4), boxes_of(3)).shape == (0, 3)

    def test_trace_compile_export_and_fx(self, name):
        function = IOUS[name][0]

        class IoU(nn.Module):
            def forward(self, boxes1: Tensor, boxes2: Tensor) -> Tensor:
                return function(boxes1, boxes2)

        check_in_all_ways(IoU(), (boxes_of(5), boxes_of(4)), (boxes_of(300), boxes_of(200)))


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_formats_of_boxes(fmt, dtype):
    boxes1, boxes2 = (theirs.box_convert(boxes_of(n).round(), "xyxy", fmt).to(dtype) for n in (9, 7))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = theirs.box_iou(boxes1.to(wide), boxes2.to(wide), fmt)
    torch.testing.assert_close(ops.box_iou(boxes1, boxes2, fmt), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"fmt must be .* got 'cxcywhr'; torchvision"):
        ops.box_iou(boxes1, boxes2, fmt="cxcywhr")


class TestNMS:
    @pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.2, 0.5, 1 / 3, 0.9, 1.0, 1.5])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("count", [0, 1, 60, 3000])
    def test_dtypes_and_thresholds(self, dtype, threshold, count):
        boxes, scores = strided(boxes_of(count)).to(dtype), torch.rand(count).to(dtype)
        # torchvision's operator takes half precision on a GPU alone.
        wide = dtype if dtype == torch.float64 else torch.float32
        expected = theirs.nms(boxes.to(wide), scores.to(wide), threshold)
        assert torch.equal(ops.nms(boxes, scores, threshold), expected)

    @pytest.mark.parametrize(("first", "second"), MIXED)
    def test_mixed_dtypes(self, first, second):
        boxes, scores = boxes_of(80).to(first), torch.rand(80).to(second)
        wide = torch.float64 if torch.float64 in (first, second) else torch.float32
        assert torch.equal(ops.nms(boxes, scores, 0.4), theirs.nms(boxes.to(wide), scores.to(wide), 0.4))

    def test_float64_is_decided_in_float64(self):
        """Pairs so close to the threshold that fp32 decides otherwise."""
        steps = torch.arange(-1000, 1000, dtype=torch.float64) * 1e-10
        second = torch.tensor([0.0, 0.0, 10.0, 10.0], dtype=torch.float64).repeat(len(steps), 1)
        second[:, 2] = 5 + steps
        scores = torch.tensor([1.0, 0.5], dtype=torch.float64)
        differing = 0
        for box in second[::40]:
            boxes = torch.stack([torch.tensor([0.0, 0.0, 10.0, 10.0], dtype=torch.float64), box])
            expected = theirs.nms(boxes, scores, 0.5)
            assert torch.equal(ops.nms(boxes, scores, 0.5), expected)
            differing += len(expected) != len(theirs.nms(boxes.float(), scores.float(), 0.5))
        assert differing > 10

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("threshold", [-0.5, 0.3, 0.5, 2.0])
    @pytest.mark.parametrize(
        "idxs_dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64, torch.float16]
    )
    @pytest.mark.parametrize("count", [0, 90, 1200])
    def test_batched_is_nms_in_each_group(self, dtype, threshold, idxs_dtype, count):
        boxes, scores = boxes_of(count).to(dtype), torch.rand(count).to(dtype)
        idxs = torch.randint(-3 if idxs_dtype.is_signed else 0, 5, (count,)).to(idxs_dtype)
        wide = dtype if dtype == torch.float64 else torch.float32
        keep = torch.zeros(count, dtype=torch.bool)
        for group in idxs.unique():
            members = (idxs == group).nonzero()[:, 0]
            keep[members[theirs.nms(boxes[members].to(wide), scores[members].to(wide), threshold)]] = True
        order = scores.to(wide).argsort(descending=True, stable=True)
        expected = order[keep[order]]
        assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold), expected)
        assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold, 7), expected[:7])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("threshold", [-1.0, 0.5, 3.0])
    def test_what_is_not_finite_is_never_returned(self, dtype, threshold):
        boxes, scores = boxes_of(50).to(dtype), torch.rand(50).to(dtype)
        boxes[::7, 1], boxes[3::11, 2] = torch.nan, torch.inf
        finite = boxes.isfinite().all(1)
        rows = finite.nonzero()[:, 0]
        expected = rows[theirs.nms(boxes[finite], scores[finite], threshold)]
        assert torch.equal(ops.nms(boxes, scores, threshold), expected)
        assert torch.equal(ops.batched_nms(boxes, scores, torch.zeros(50), threshold), expected)

    def test_no_boxes_of_one_dimension(self):
        """As of torch.tensor([]), which torchvision's takes without a look at the rest."""
        for nothing in (torch.tensor([]), torch.zeros(0, dtype=torch.int64)):
            expected = theirs.batched_nms(nothing, None, None, None)
            torch.testing.assert_close(ops.batched_nms(nothing, None, None, None), expected)
            torch.testing.assert_close(ops.batched_nms(nothing, nothing, nothing, 0.5, 3), expected)

    def test_nms_in_all_ways(self):
        class Suppress(nn.Module):
            def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
                return ops.nms(boxes, scores, 0.5)

        with_nan = boxes_of(40)
        with_nan[3] = torch.nan
        check_in_all_ways(
            Suppress(), *((boxes, torch.rand(len(boxes))) for boxes in (boxes_of(40), boxes_of(90), with_nan))
        )

    @pytest.mark.parametrize("max_keep", [None, 9])
    def test_batched_nms_in_all_ways(self, max_keep):
        class Suppress(nn.Module):
            def forward(self, boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
                return ops.batched_nms(boxes, scores, idxs, 0.5, max_keep)

        check_in_all_ways(
            Suppress(), *((boxes_of(n), torch.rand(n), torch.randint(groups, (n,))) for n, groups in ((40, 3), (90, 8)))
        )

    def test_a_result_of_compiled_code_can_be_used_in_it(self):
        def best(boxes: Tensor, scores: Tensor) -> Tensor:
            return boxes[ops.nms(boxes, scores, 0.5)].mean(0)

        boxes, scores = boxes_of(30), torch.rand(30)
        compiled = torch.compile(best, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(boxes, scores), best(boxes, scores))
        torch.testing.assert_close(compiled(boxes[:20], scores[:20]), best(boxes[:20], scores[:20]))


def check_in_all_ways(module: nn.Module, *inputs: tuple[Tensor, ...]) -> None:
    """`module` traced with the first inputs, compiled, exported and symbolically traced gives what it gives eagerly."""
    expected = [module(*each) for each in inputs]

    def check(converted: Callable[..., Any]) -> None:
        for each, wanted in zip(inputs, expected, strict=True):
            assert_equal(converted(*each), wanted)

    check(torch.jit.trace(module, inputs[0], check_trace=False))
    check(torch.fx.symbolic_trace(module))
    torch._dynamo.reset()
    check(torch.compile(module, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    check(torch.compile(module, backend="aot_eager"))
    varying = tuple({0: torch.export.Dim.AUTO} for _ in inputs[0])
    check(torch.export.export(module, inputs[-1], dynamic_shapes=varying, strict=False).module())
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = module(*(mode.from_tensor(each) for each in inputs[0]))
    assert fake.dtype == expected[0].dtype
    assert fake.shape[1:] == expected[0].shape[1:]
    wrapped = (
        tv_tensors.BoundingBoxes(inputs[0][0], format="XYXY", canvas_size=(99, 99)) if fake.ndim < 3 else inputs[0][0]
    )
    assert_equal(module(wrapped, *inputs[0][1:]), expected[0])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0 if expected.dtype == torch.int64 else 1e-6, atol=0)


def test_a_trace_of_operators_holds_no_values():
    """As of torch.func.linearize and functorch's compilers, which torch.compiler.is_compiling() does not tell."""
    for function in (
        lambda boxes: ops.box_iou(boxes, boxes),
        lambda boxes: ops.roi_align(FEATURES, torch.nn.functional.pad(boxes, (1, 0)), 2),
        lambda boxes: ops.roi_pool(FEATURES, torch.nn.functional.pad(boxes, (1, 0)), 2),
    ):
        traced = make_fx(function)(boxes_of(9, 8.0))
        other = boxes_of(9, 8.0)
        torch.testing.assert_close(traced(other), function(other))
    rois = rois_of(5, 1, 8.0)
    value, jvp = torch.func.linearize(lambda x: ops.roi_align(x, rois, 2), FEATURES)
    torch.testing.assert_close(jvp(FEATURES), value)


def test_gradients_of_touching_boxes_are_torchvisions():
    pairs = [([0.0, 0, 10, 10], [10.0, 0, 20, 10]), ([0.0, 0, 5, 5], [0.0, 0, 9, 9]), ([2.0, 2, 4, 4], [2.0, 0, 4, 9])]
    for (ours, reference), pair in itertools.product(IOUS.values(), pairs):
        gradients = []
        for function in (ours, reference):
            boxes1, boxes2 = (torch.tensor([box], requires_grad=True) for box in pair)
            gradients.append(torch.autograd.grad(function(boxes1, boxes2).sum(), (boxes1, boxes2)))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_default_device_is_not_that_of_the_results():
    boxes, scores, ids = boxes_of(3000), torch.rand(3000), torch.arange(3000)
    calls = [
        lambda: ops.nms(boxes, scores, 0.5),
        *(lambda n=n: ops.batched_nms(boxes, scores, ids % n, 0.5) for n in (1, 3, 20)),
    ]
    expected = [call() for call in calls]
    with torch.device("meta"):
        assert all(map(torch.equal, [call() for call in calls], expected))


def scripted(boxes: Tensor, scores: Tensor, features: Tensor) -> list[Tensor]:
    idxs = scores > 0.5
    return [
        ops.nms(boxes, scores, 0.5, None),
        ops.batched_nms(boxes, scores, idxs, 0.5, None),
        ops.box_iou(boxes, boxes, "xyxy"),
        ops.generalized_box_iou(boxes, boxes),
        ops.distance_box_iou(boxes, boxes, 1e-7),
        ops.complete_box_iou(boxes, boxes, 1e-7),
        ops.roi_align(features, [boxes], (2, 2), 0.25, 2, True),
        ops.roi_pool(features, [boxes], [3, 3], 0.25),
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:")
def test_torchscript_calls_the_operations_in_python():
    function = torch.jit.script(scripted)
    for count in (5, 40):
        inputs = boxes_of(count), torch.rand(count), torch.randn(1, 2, 8, 9)
        for found, expected in zip(function(*inputs), scripted(*inputs), strict=True):
            assert_equal(found, expected)
    for operation in (ops.nms, ops.batched_nms, ops.box_iou, ops.roi_align):
        with pytest.raises(RuntimeError, match=f"script a function that calls {operation.__name__}"):
            torch.jit.script(operation)


def test_two_kinds_of_tensor_subclasses_together():
    """Such as an image and its boxes, as torchvision's transforms give them."""

    class Other(torch.Tensor):
        pass

    boxes = tv_tensors.BoundingBoxes(boxes_of(20), format="XYXY", canvas_size=(64, 64))
    scores, features = torch.rand(20).as_subclass(Other), tv_tensors.Image(FEATURES)
    plain, values = boxes.as_subclass(Tensor), scores.as_subclass(Tensor)
    assert_equal(ops.roi_align(features, [boxes], 3), ops.roi_align(FEATURES, [plain], 3))
    assert_equal(ops.roi_pool(features, [boxes], 3), ops.roi_pool(FEATURES, [plain], 3))
    assert_equal(ops.box_iou(boxes, plain.as_subclass(Other)), ops.box_iou(plain, plain))
    for max_keep in (None, 3):
        assert_equal(ops.nms(boxes, scores, 0.5, max_keep), ops.nms(plain, values, 0.5, max_keep))
        groups = torch.zeros(20)
        kept = ops.batched_nms(boxes, scores, groups, 0.5, max_keep)
        assert_equal(kept, ops.nms(plain, values, 0.5, max_keep))


def test_a_gradient_of_boxes_alone_is_not_recorded():
    """A row of the table of differences."""
    rois = rois_of(3, 1).requires_grad_()
    for ours, reference in POOLS.values():
        assert reference(FEATURES, rois, 2).requires_grad
        assert not ours(FEATURES, rois, 2).requires_grad
