import math

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from fastdet import boxes
from tests.helpers.checks import assert_close, awkward_boxes, random_boxes

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)]
STEP = float(np.spacing(np.float32(1)))


def valid_boxes(*shape: int) -> torch.Tensor:
    out = random_boxes(*shape)
    return out + torch.tensor([0.0, 0.0, 1.0, 1.0])


def loop_encode(reference: list[float], box: list[float], weights: tuple[float, ...]) -> list[float]:
    aw, ah, w, h = reference[2] - reference[0], reference[3] - reference[1], box[2] - box[0], box[3] - box[1]
    dx = (sum(box[0::2]) - sum(reference[0::2])) / 2 / aw
    dy = (sum(box[1::2]) - sum(reference[1::2])) / 2 / ah
    return [part * weight for part, weight in zip((dx, dy, math.log(w / aw), math.log(h / ah)), weights, strict=True)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_encode_equals_a_float64_loop(weights):
    reference, targets = valid_boxes(23).double(), valid_boxes(23).double()
    pairs = zip(reference.tolist(), targets.tolist(), strict=True)
    expected = torch.tensor([loop_encode(a, b, weights) for a, b in pairs], dtype=torch.float64)
    assert_close(boxes.encode(reference, targets, weights), expected, torch.float64)
    assert_close(boxes.encode(reference.float(), targets.float(), weights), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_encode_and_decode_equal_torchvision(weights):
    reference, targets = valid_boxes(200), valid_boxes(200)
    coder = BoxCoder(weights)
    encoded = boxes.encode(reference, targets, weights)
    torch.testing.assert_close(encoded, coder.encode_single(targets, reference), rtol=4 * STEP, atol=0)
    deltas = torch.randn(200, 4) * 4
    decoded = boxes.decode(deltas, reference, weights, clamp=coder.bbox_xform_clip)
    torch.testing.assert_close(decoded, coder.decode_single(deltas, reference), rtol=4 * STEP, atol=4 * STEP)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_inverts_encode(weights):
    reference, targets = valid_boxes(3, 7).double(), valid_boxes(3, 7).double()
    assert_close(boxes.decode(boxes.encode(reference, targets, weights), reference, weights), targets, torch.float64)


def test_references_broadcast():
    reference, targets = valid_boxes(5), valid_boxes(2, 5)
    encoded = boxes.encode(reference, targets)
    assert encoded.shape == (2, 5, 4)
    assert torch.equal(encoded[1], boxes.encode(reference, targets[1]))
    assert torch.equal(boxes.decode(encoded, reference)[1], boxes.decode(encoded[1], reference))
    assert boxes.encode(reference[:0], targets[:, :0]).shape == (2, 0, 4)


def test_clamp_limits_the_sides_alone():
    reference = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    deltas = torch.tensor([[9.0, -9.0, 200.0, float("nan")]])
    assert boxes.decode(deltas, reference)[0, 2] == math.inf
    x1, y1, x2, y2 = boxes.decode(deltas, reference, clamp=math.log(2))[0].tolist()
    assert (x1, x2) == pytest.approx((85, 105))
    assert math.isnan(y1)
    assert math.isnan(y2)
    weighted = boxes.decode(deltas, reference, (1.0, 1.0, 100.0, 1.0), clamp=math.log(2))[0]
    assert float(weighted[2] - weighted[0]) == pytest.approx(20), "the clamp comes after the weights"


@pytest.mark.parametrize("shape", [(0,), (1,), (6,), (3, 2), ()])
def test_clip_equals_torchvision(shape):
    sizes = torch.tensor([[50, 60], [70, 40]])
    inside = random_boxes(2, *shape) * 2 - 50
    clipped = boxes.clip(inside, sizes)
    assert clipped.shape == inside.shape
    for image in range(2):
        assert torch.equal(clipped[image], clip_boxes_to_image(inside[image], tuple(sizes[image].tolist())))


def test_clip_keeps_nan_and_clips_infinities():
    clipped = boxes.clip(awkward_boxes()[None], torch.tensor([[8, 9]]))[0]
    assert clipped[9].tolist() == [0, 0, 9, 8]


def test_sides():
    width, height = boxes.sides(awkward_boxes())
    assert (width[3], height[3]) == (10, 10)
    assert (width[6], height[6]) == (-6, -6)
    assert torch.isnan(width[7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    reference, targets = valid_boxes(9).to(dtype), valid_boxes(9).to(dtype)
    encoded = boxes.encode(reference, targets)
    assert encoded.dtype == torch.float32
    assert torch.equal(encoded, boxes.encode(reference.float(), targets.float()))
    assert boxes.decode(encoded.to(dtype), reference).dtype == torch.float32
    sizes = torch.tensor([[2049, 2049]])
    assert boxes.clip(torch.full((1, 4), 4096.0, dtype=dtype), sizes).tolist() == [[2049.0] * 4]
    assert boxes.sides(reference)[0].dtype == torch.float32


def test_gradients():
    reference, targets = valid_boxes(3).double(), valid_boxes(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: boxes.encode(reference, x, (1.0, 2.0, 3.0, 4.0)), (targets,))
    assert torch.autograd.gradcheck(lambda x: boxes.decode(x / 100, reference, clamp=4.0), (targets,))
