import pytest
import torch
import torchvision

from fastdet import ops
from fastdet.ops.box_iou import box_iou_cuda, pairwise
from tests.helpers.checks import assert_close, awkward_boxes, check_operator, random_boxes

NAN, INF = float("nan"), float("inf")
KINDS = ("iou", "generalized", "distance", "complete")
PUBLIC = {
    "iou": (ops.box_iou, torchvision.ops.box_iou),
    "generalized": (ops.generalized_box_iou, torchvision.ops.generalized_box_iou),
    "distance": (ops.distance_box_iou, torchvision.ops.distance_box_iou),
    "complete": (ops.complete_box_iou, torchvision.ops.complete_box_iou),
}


def loop_iou(first: list[float], second: list[float]) -> float:
    """IoU of two boxes in float64, by hand; 0 where it is undefined."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if not (width > 0 and height > 0):
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    value = width * height / (sum(areas) - width * height)
    return value if value > 0 else 0.0


@pytest.mark.parametrize(("num_boxes1", "num_boxes2"), [(0, 3), (3, 0), (1, 1), (7, 5), (33, 130)])
def test_iou_equals_a_float64_loop(num_boxes1, num_boxes2):
    boxes1, boxes2 = random_boxes(num_boxes1), random_boxes(num_boxes2)
    expected = torch.tensor([[loop_iou(a, b) for b in boxes2.tolist()] for a in boxes1.tolist()])
    assert_close(ops.box_iou(boxes1, boxes2), expected.reshape(num_boxes1, num_boxes2))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_torchvision_on_valid_boxes(kind):
    ours, theirs = PUBLIC[kind]
    boxes1, boxes2 = random_boxes(40), random_boxes(50)
    assert_close(ours(boxes1, boxes2), theirs(boxes1, boxes2))
    assert_close(ours(boxes1[None], boxes2[None])[0], theirs(boxes1, boxes2))
    assert_close(ours(boxes1.double(), boxes2.double()), theirs(boxes1.double(), boxes2.double()), torch.float64)


def test_undefined_ratios_are_zero():
    boxes = awkward_boxes()
    iou = ops.box_iou(boxes, boxes)
    assert torch.isfinite(iou).all()
    assert iou[0, 1] == 1
    assert (iou[4:7] == 0).all(), "degenerate and inverted boxes overlap nothing, themselves included"
    assert (iou[7] == 0).all()
    assert torch.isfinite(ops.generalized_box_iou(boxes[:7], boxes[:7])).all()


NOT_FINITE = torch.tensor([[NAN, 0, 10, 10], [0, 0, INF, INF], [-INF, -INF, INF, INF], [0, 0, 9, -INF], [INF, 0, 9, 9]])


@pytest.mark.parametrize("kind", ["iou", "generalized"])
def test_what_is_not_finite_is_0_to_all_without_a_gradient(kind):
    boxes = torch.cat([random_boxes(4), NOT_FINITE])
    for repeats in (1, 100):
        values = PUBLIC[kind][0](boxes.repeat(repeats, 1), NOT_FINITE.repeat(repeats, 1))
        assert (values == 0).all()
    leaf = boxes.clone().requires_grad_()
    values = PUBLIC[kind][0](leaf, NOT_FINITE)
    values.sum().backward()
    assert (values == 0).all()
    assert (leaf.grad == 0).all()


def test_batches_are_independent_and_layout_does_not_matter():
    boxes1, boxes2 = random_boxes(2, 3, 5), random_boxes(2, 3, 4)
    batched = ops.box_iou(boxes1, boxes2)
    assert batched.shape == (2, 3, 5, 4)
    for i in range(2):
        for j in range(3):
            assert torch.equal(batched[i, j], ops.box_iou(boxes1[i, j], boxes2[i, j]))
    strided = boxes1.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    assert torch.equal(ops.box_iou(strided, boxes2), batched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    boxes1, boxes2 = random_boxes(9).to(dtype), random_boxes(8).to(dtype)
    out = ops.box_iou(boxes1, boxes2)
    assert out.dtype == torch.float32
    assert torch.equal(out, ops.box_iou(boxes1.float(), boxes2.float()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    ours, _ = PUBLIC[kind]
    boxes1 = random_boxes(3).double().requires_grad_()
    boxes2 = random_boxes(2).double().requires_grad_()
    if kind == "complete":  # its weight is constant on purpose, unlike in a numeric gradient
        ours(boxes1.float(), boxes2.float()).sum().backward()
        assert torch.isfinite(boxes1.grad).all()
    else:
        assert torch.autograd.gradcheck(ours, (boxes1, boxes2))


def test_gradients_of_awkward_pairs_are_zeros():
    """Where the value is 0 for all values of the boxes, and never NaN for the valid box of a pair."""
    valid, awkward = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), awkward_boxes()
    for kind in KINDS:
        first, second = valid.clone().requires_grad_(), awkward.clone().requires_grad_()
        rows = slice(None) if kind == "iou" else slice(0, 7)
        PUBLIC[kind][0](first, second[rows]).sum().backward()
        assert torch.isfinite(first.grad).all(), kind
        assert torch.isfinite(second.grad).all(), kind
    first, second = valid.clone().requires_grad_(), awkward[4:10].clone().requires_grad_()
    ops.box_iou(first, second).sum().backward()
    assert (first.grad == 0).all()
    assert (second.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_with_symbolic_sizes_and_numbers(kind):
    torch._dynamo.reset()
    ours = PUBLIC[kind][0]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (5, 6):
        boxes1, boxes2 = random_boxes(count), random_boxes(count + 2)
        torch.testing.assert_close(compiled(boxes1, boxes2), ours(boxes1, boxes2))


def test_operator_contract():
    check_operator(torch.ops.fastdet.box_iou, random_boxes(2, 3), random_boxes(2, 5), "generalized", 1e-7)


@pytest.mark.parametrize(
    ("boxes1", "boxes2", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"boxes1 .* \[2, 3\]"),
        (torch.zeros(2, 4), torch.zeros(4), ValueError, r"boxes2 .* \[4\]"),
        (torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4), TypeError, "boxes1 .* or a signed integer, .*bool"),
        ([[0, 0, 1, 1]], torch.zeros(2, 4), TypeError, "boxes1 .*list"),
        (torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), ValueError, "boxes2 is on meta"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), ValueError, "leading dimensions"),
    ],
)
def test_bad_input_names_the_argument(boxes1, boxes2, error, words):
    with pytest.raises(error, match=words):
        ops.box_iou(boxes1, boxes2)


@pytest.mark.parametrize(("eps", "error"), [("x", TypeError), (float("nan"), ValueError), (-1e-7, ValueError)])
def test_bad_eps_is_named(eps, error):
    with pytest.raises(error, match=f"eps .*{eps}|eps .*NaN"):
        ops.distance_box_iou(torch.zeros(2, 4), torch.zeros(2, 4), eps)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "num_boxes1", "num_boxes2"), [(1, 1, 1), (2, 17, 129), (1, 5, 300)])
def test_kernel_equals_cpu(kernel_device, kind, batch, num_boxes1, num_boxes2):
    boxes1 = random_boxes(batch, num_boxes1).to(kernel_device)
    boxes2 = random_boxes(batch, num_boxes2).to(kernel_device)
    actual = box_iou_cuda(boxes1, boxes2, kind, 1e-7)
    expected = pairwise(boxes1.cpu(), boxes2.cpu(), kind, 1e-7)
    if kind == "iou":
        assert torch.equal(actual.cpu(), expected)
    assert_close(actual.cpu(), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["iou", "generalized"])
def test_kernel_on_awkward_boxes(kernel_device, kind):
    boxes = torch.cat([awkward_boxes(), NOT_FINITE])[None].to(kernel_device)
    actual = box_iou_cuda(boxes, boxes, kind, 1e-7).cpu()
    assert_close(actual, pairwise(boxes.cpu(), boxes.cpu(), kind, 1e-7))


@pytest.mark.kernel
def test_kernel_takes_empty_and_strided_input(kernel_device):
    assert box_iou_cuda(*(torch.zeros(2, n, 4, device=kernel_device) for n in (0, 3)), "iou", 1e-7).shape == (2, 0, 3)
    boxes = random_boxes(1, 6).to(kernel_device)
    strided = boxes.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(box_iou_cuda(strided, boxes, "iou", 1e-7), box_iou_cuda(boxes, boxes, "iou", 1e-7))
