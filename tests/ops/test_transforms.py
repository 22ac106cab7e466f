"""Derivatives in every mode, and torch.func's transforms, of the differentiable operations."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from fastdet import ops
from fastdet.ops.cpu.overlap import TILE
from tests.helpers.checks import assert_close

Function = Callable[[Tensor], Tensor]
IOUS = {
    "iou": ops.box_iou,
    "generalized": ops.generalized_box_iou,
    "distance": ops.distance_box_iou,
    "complete": ops.complete_box_iou,
}
ROIS = torch.tensor(
    [[0, 0.0, 0.0, 9.0, 5.0], [1, 1.3, 2.0, 7.0, 6.1], [1, -3.0, 4.0, 2.0, 20.0], [0, 40.0, 40, 50, 50]]
)


def boxes(count: int) -> Tensor:
    corner = torch.rand(count, 2) * 50
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * 20], 1)


def cases() -> dict[str, tuple[Function, Tensor]]:
    torch.manual_seed(0)
    found: dict[str, tuple[Function, Tensor]] = {}
    for name, function in IOUS.items():
        for first, second in ((6, 5), (TILE // 100, 99), (TILE // 100, 120)):
            found[f"{name} {first} x {second}"] = partial(function, boxes2=boxes(second)), boxes(first)
    features = torch.randn(2, 3, 6, 8)
    found["roi_pool"] = partial(ops.roi_pool, boxes=ROIS, output_size=(2, 3)), features
    for ratio in (2, -1):
        align = partial(ops.roi_align, boxes=ROIS, output_size=(2, 3), sampling_ratio=ratio, aligned=True)
        found[f"roi_align {ratio}"] = align, features
    coarse, per_image = torch.randn(2, 3, 3, 4), [ROIS[ROIS[:, 0] == k, 1:] for k in (0, 1)]

    def pyramid(level: Tensor) -> Tensor:
        canonical = {"canonical_scale": 8, "canonical_level": 1}
        return ops.multiscale_roi_align([level, coarse.to(level)], per_image, 2, (0.5, 0.25), **canonical)

    found["multiscale_roi_align"] = pyramid, features
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_all_modes_of_derivatives_agree(name):
    """Forward mode gives J v and reverse mode w J, and w (J v) = (w J) v; central differences give J v too."""
    function, x = CASES[name]
    torch.manual_seed(1)
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v)))
    w = torch.randn_like(value)
    (gradient,) = torch.autograd.grad(function(leaf := x.clone().requires_grad_()), leaf, w)
    assert tangent.abs().max() > 0
    assert_close((w * tangent).double().sum(), (gradient * v).double().sum(), torch.float32)
    assert torch.equal(value, function(x))
    again, by_jvp = torch.func.jvp(function, (x,), (v,))
    assert torch.equal(again, value)
    assert torch.equal(by_jvp, tangent)
    _, by_vjp = torch.func.vjp(function, x)
    assert torch.equal(by_vjp(w)[0], gradient)


@pytest.mark.parametrize("name", [name for name, (_, x) in CASES.items() if x.shape[0] < 10])
def test_jacobians_by_rows_and_by_columns_agree(name):
    function, x = CASES[name]
    rows, columns = torch.func.jacrev(function)(x), torch.func.jacfwd(function)(x)
    assert rows.abs().max() > 0
    torch.testing.assert_close(rows, columns)


@pytest.mark.parametrize("name", [name for name, (_, x) in CASES.items() if len(x) < 10])
def test_compiled_transforms_give_what_they_give_eagerly(name):
    function, x = CASES[name]
    torch.manual_seed(1)
    v = torch.randn_like(x)

    def transformed(x: Tensor, v: Tensor) -> list[Tensor]:
        gradient = torch.func.grad(lambda each: function(each).square().sum())
        columns = torch.func.jacfwd(lambda each: function(each))(x)
        return [*torch.func.jvp(function, (x,), (v,)), torch.vmap(function)(x[None]), gradient(x), columns]

    torch._dynamo.reset()
    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x, v)
    expected = transformed(x, v)
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["roi_pool", "roi_align 2", "multiscale_roi_align"])
def test_compiled_autograd_gives_the_gradient(name):
    """Where `torch._dynamo.config.compiled_autograd` is set, as FSDP may."""
    function, x = CASES[name]

    def gradient(leaf: Tensor) -> Tensor:
        (function(leaf) ** 2).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradient(x.clone().requires_grad_())
    torch.testing.assert_close(found, gradient(x.clone().requires_grad_()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name, (_, x) in CASES.items() if len(x) < 10])
def test_vectorized_derivatives_are_those_of_a_loop(name):
    """As gradients for many outputs at once, through the batched tensors that torch had before torch.func."""
    function, x = CASES[name]
    leaf = x.double().requires_grad_()
    out = function(leaf)
    grads = torch.rand(3, *out.shape, dtype=out.dtype, requires_grad=True)
    (together,) = torch.autograd.grad(out, leaf, grads, is_grads_batched=True, create_graph=True)
    apart = torch.stack([torch.autograd.grad(out, leaf, grad, create_graph=True)[0] for grad in grads])
    assert apart.abs().max() > 0
    torch.testing.assert_close(together, apart)
    seconds = [torch.autograd.grad((each**2).sum(), grads, retain_graph=True)[0] for each in (together, apart)]
    torch.testing.assert_close(*seconds)
    x, expected = x.double(), jacobian(function, x.double())
    for strategy in ("reverse-mode", "forward-mode"):
        torch.testing.assert_close(jacobian(function, x, vectorize=True, strategy=strategy), expected)
        vectorized = hessian(lambda each: (function(each) ** 3).sum(), x, False, False, True, strategy)
        torch.testing.assert_close(vectorized, hessian(lambda each: (function(each) ** 3).sum(), x))


# The gradient of "complete" takes a weight for a constant that varies: its derivative is a matter of definition.
@pytest.mark.parametrize("name", [name for name, (_, x) in CASES.items() if len(x) < 10 and "complete" not in name])
def test_second_derivatives_agree_in_all_modes(name):
    """Of a cubic sum, through any nesting of the modes and beside finite differences of the gradient."""
    function, x = CASES[name]
    x = x.double()

    def cubic(each: Tensor) -> Tensor:
        return (function(each) ** 3).sum()

    torch.manual_seed(1)
    v = torch.randn_like(x)
    step = 1e-6
    gradient = torch.func.grad(cubic)
    expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    assert expected.abs().max() > 0
    twice = [
        torch.func.jvp(gradient, (x,), (v,))[1],
        torch.func.grad(lambda each: torch.func.jvp(cubic, (each,), (v,))[1])(x),
        torch.func.grad(lambda each: (gradient(each) * v).sum())(x),
        torch.autograd.functional.hvp(cubic, x, v)[1],
    ]
    for found in twice:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name):
    function, x = CASES[name]
    batch = torch.stack([x, x.flip(0), x * 0.5])
    assert_close(torch.vmap(function)(batch), torch.stack([function(each) for each in batch]), torch.float32)
    moved = torch.vmap(function, in_dims=1)(batch.transpose(0, 1))
    assert torch.equal(moved, torch.vmap(function)(batch))
    gradient = torch.func.grad(lambda each: function(each).square().sum())
    assert_close(torch.vmap(gradient)(batch), torch.stack([gradient(each) for each in batch]), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_no_entries(name):
    function, x = CASES[name]
    none = x.new_empty(0, *x.shape, requires_grad=True)
    found = torch.vmap(function)(none)
    assert found.shape == (0, *function(x).shape)
    (gradient,) = torch.autograd.grad(found.sum(), none)
    assert gradient.shape == none.shape
    each = torch.vmap(torch.func.grad(lambda each: function(each).sum()))(none)
    assert each.shape == none.shape
    moved = torch.vmap(torch.vmap(function), in_dims=1)(x.new_empty(0, 3, *x.shape))
    assert moved.shape == (3, *found.shape)


@pytest.mark.parametrize("function", [ops.roi_align, ops.roi_pool])
def test_jacobians_of_no_boxes(function):
    x = CASES["roi_pool"][1]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert transform(lambda each: function(each, ROIS[:0], 2))(x).shape == (0, 3, 2, 2, *x.shape)


def test_vmap_over_boxes_of_roi_align():
    features, rois = CASES["roi_align 2"][1], torch.stack([ROIS, ROIS.flip(0)])
    pooled = torch.vmap(lambda each: ops.roi_align(features, each, 2, 0.5, 2, True))(rois)
    assert torch.equal(pooled, torch.stack([ops.roi_align(features, each, 2, 0.5, 2, True) for each in rois]))


def test_vmap_of_operations_with_several_results():
    index, count = torch.vmap(lambda b: torch.ops.fastdet.nms(b[None], torch.ones(1, 7).bool(), 0.5, 7))(
        torch.stack([boxes(7), boxes(7)])
    )
    assert index.shape == (2, 1, 7)
    assert count.shape == (2, 1)


def test_vmap_over_no_entries_of_several_results():
    def suppress(boxes: Tensor) -> ops.Kept:
        return ops.nms_padded(boxes[None], boxes.new_ones(1, 7), 0.5, 3)

    for found, each in zip(torch.vmap(suppress)(torch.empty(0, 7, 4)), suppress(boxes(7)), strict=True):
        assert found.shape == (0, *each.shape)
        assert found.dtype == each.dtype


def test_tangents_of_maxima_outside_the_map_are_zero():
    function, x = CASES["roi_pool"]
    _, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, (function(x) != 0).float())
