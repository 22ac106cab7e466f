import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from fastdet import ops
from fastdet.ops.decode import decode_cpu, decode_cuda
from tests.helpers.checks import assert_close, check_operator

CLAMP = math.log(1000 / 16)
NAN, INF = float("nan"), float("inf")


def cell_anchors(count):
    center, half = torch.rand(count, 2) * 8, torch.rand(count, 2) * 20 + 4
    return torch.cat([center - half, center + half], dim=1)


def head(batch, num_anchors, num_logits, height, width, dtype=torch.float32):
    deltas = torch.randn(batch, num_anchors * 4, height, width) * 0.7
    logits = torch.randn(batch, num_anchors * num_logits, height, width)
    return deltas.to(dtype), logits.to(dtype)


def loop_decode(deltas, logits, anchors, sizes, min_side, stride_h, stride_w, clamp):
    """One anchor after the other, in float64."""
    batch, _, height, width = deltas.shape
    num_logits = logits.shape[1] // len(anchors)
    deltas, logits, anchors = (x.double().tolist() for x in (deltas, logits, anchors))
    boxes, scores = [], []
    for image in range(batch):
        limit_y, limit_x = sizes[image].tolist()
        for h in range(height):
            for w in range(width):
                for a, (x1, y1, x2, y2) in enumerate(anchors):
                    dx, dy, dw, dh = (deltas[image][a * 4 + part][h][w] for part in range(4))
                    logit = [logits[image][a * num_logits + part][h][w] for part in range(num_logits)]
                    score = logit[-1] - logit[0] if num_logits == 2 else logit[0]
                    x = (x1 + x2) / 2 + w * stride_w + dx * (x2 - x1)
                    y = (y1 + y2) / 2 + h * stride_h + dy * (y2 - y1)
                    half_w = (x2 - x1) / 2 * math.exp(min(dw, clamp))
                    half_h = (y2 - y1) / 2 * math.exp(min(dh, clamp))
                    box = [
                        min(max(value, 0), limit)
                        for value, limit in (
                            (x - half_w, limit_x),
                            (y - half_h, limit_y),
                            (x + half_w, limit_x),
                            (y + half_h, limit_y),
                        )
                    ]
                    least = float(min_side[image])
                    boxes.append(box)
                    scores.append(score if box[2] - box[0] >= least and box[3] - box[1] >= least else -INF)
    count = height * width * len(anchors)
    return torch.tensor(boxes).reshape(batch, count, 4), torch.tensor(scores).reshape(batch, count)


def assert_decoded(actual, expected):
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found.cpu(), wanted.cpu())


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("num_logits", [1, 2])
@pytest.mark.parametrize(
    ("batch", "num_anchors", "height", "width"), [(0, 3, 2, 2), (2, 3, 0, 4), (1, 1, 1, 1), (2, 3, 5, 7), (1, 9, 6, 4)]
)
def test_equals_a_float64_loop(batch, num_anchors, height, width, num_logits, clamp):
    deltas, logits = head(batch, num_anchors, num_logits, height, width)
    anchors = cell_anchors(num_anchors)
    sizes = torch.tensor([[70, 90], [50, 61]])[:batch]
    min_side = torch.tensor([16.0, 7.0])[:batch]
    result = ops.decode(deltas, logits, anchors, sizes, stride=(16, 12), min_side=min_side, clamp=clamp)
    bound = INF if clamp is None else clamp
    assert_decoded(result, loop_decode(deltas, logits, anchors, sizes, min_side, 16, 12, bound))
    if batch == 2 and height:
        assert (result.scores == -INF).any()
        assert torch.isfinite(result.scores).any()


def test_equals_torchvision():
    generator = AnchorGenerator(((32, 64, 128),), ((0.5, 1.0, 2.0),))
    images = ImageList(torch.zeros(2, 3, 160, 208), [(160, 208), (150, 180)])
    deltas, logits = head(2, 9, 1, 10, 13)
    deltas = deltas * 3
    anchors = generator(images, [deltas])
    by_anchor = deltas.view(2, 9, 4, 10, 13).permute(0, 3, 4, 1, 2).reshape(-1, 4)
    decoded = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(by_anchor, anchors).view(2, -1, 4)
    expected = torch.stack([clip_boxes_to_image(*pair) for pair in zip(decoded, images.image_sizes, strict=True)])
    sizes = torch.tensor(images.image_sizes)
    result = ops.decode(deltas, logits, generator.cell_anchors[0], sizes, stride=(16, 16), clamp=CLAMP)
    assert_close(result.boxes, expected)
    assert torch.equal(result.scores, logits.permute(0, 2, 3, 1).reshape(2, -1))


def test_two_logits_are_background_and_object():
    deltas, logits = head(1, 2, 2, 3, 4)
    sizes = torch.tensor([[100, 100]])
    scores = ops.decode(deltas, logits, cell_anchors(2), sizes, stride=(16, 16)).scores
    pairs = logits.view(1, 2, 2, 3, 4)
    assert torch.equal(scores, (pairs[:, :, 1] - pairs[:, :, 0]).permute(0, 2, 3, 1).reshape(1, -1))


def test_what_is_not_finite_is_never_offered():
    deltas, logits = torch.zeros(1, 4, 1, 9), torch.arange(9.0).reshape(1, 1, 1, 9)
    for column, (channel, value) in enumerate([(0, NAN), (1, INF), (2, 200.0), (3, NAN), (2, -INF), (3, -200.0)]):
        deltas[0, channel, 0, column] = value
    logits[0, 0, 0, 6] = NAN
    logits[0, 0, 0, 7] = INF
    anchors, sizes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[50, 50]])
    boxes, scores = ops.decode(deltas, logits, anchors, sizes, stride=(16, 4))
    assert torch.isfinite(boxes).all()
    assert (boxes[0, :4] == 0).all()
    assert boxes[0, 6:].tolist() == [[4.0 * column, 0, 4.0 * column + 4, 4] for column in (6, 7, 8)]
    assert scores[0].tolist() == [-INF] * 4 + [4, 5, -INF, -INF, 8], "a side of 0 is finite"
    assert ops.decode(deltas, logits, anchors, sizes, stride=(16, 4), clamp=2.0).scores[0, 2] == 2
    assert (
        ops.decode(deltas, logits, anchors, sizes, stride=(16, 4), min_side=1e-3).scores[0, 4:6].tolist() == [-INF] * 2
    )


def test_minimum_side_is_of_the_clipped_box():
    anchors, sizes = torch.tensor([[-6.0, 0.0, 10.0, 16.0]]), torch.tensor([[50, 50], [50, 50]])
    deltas, logits = torch.zeros(2, 4, 1, 1), torch.ones(2, 1, 1, 1)
    min_side = torch.tensor([10.0, 10.5])
    result = ops.decode(deltas, logits, anchors, sizes, stride=(16, 16), min_side=min_side)
    assert result.boxes[0, 0].tolist() == [0, 0, 10, 16]
    assert result.scores.tolist() == [[1.0], [-INF]]


def test_layout_does_not_matter_and_images_are_independent():
    deltas, logits = head(3, 4, 2, 5, 6)
    anchors, sizes = cell_anchors(4), torch.tensor([[80, 90], [40, 50], [60, 30]])
    expected = ops.decode(deltas, logits, anchors, sizes, stride=(16, 16), min_side=8.0)
    last = (x.contiguous(memory_format=torch.channels_last) for x in (deltas, logits))
    for found, wanted in zip(ops.decode(*last, anchors, sizes, stride=(16, 16), min_side=8.0), expected, strict=True):
        assert torch.equal(found, wanted)
    for image in range(3):
        rows = slice(image, image + 1)
        alone = ops.decode(deltas[rows], logits[rows], anchors, sizes[rows], stride=(16, 16), min_side=8.0)
        assert torch.equal(alone.boxes, expected.boxes[rows])
        assert torch.equal(alone.scores, expected.scores[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    deltas, logits = head(1, 3, 2, 4, 5, dtype)
    anchors, sizes = cell_anchors(3), torch.tensor([[80, 90]])
    result = ops.decode(deltas, logits, anchors, sizes, stride=(16, 16))
    expected = ops.decode(deltas.float(), logits.float(), anchors, sizes, stride=(16, 16))
    assert result.boxes.dtype == result.scores.dtype == torch.float32
    assert torch.equal(result.boxes, expected.boxes)
    assert torch.equal(result.scores, expected.scores)


def test_carries_no_gradient():
    deltas, logits = head(1, 1, 1, 2, 2)
    result = ops.decode(
        deltas.requires_grad_(), logits.requires_grad_(), cell_anchors(1), torch.tensor([[9, 9]]), stride=(4, 4)
    )
    assert not result.boxes.requires_grad
    assert not result.scores.requires_grad


def test_operator_contract():
    deltas, logits = head(2, 3, 2, 4, 5)
    sizes, min_side = torch.tensor([[60, 70], [50, 40]]), torch.tensor([1.0, 2.0])
    check_operator(torch.ops.fastdet.decode, deltas, logits, cell_anchors(3), sizes, min_side, 16, 16, CLAMP)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"deltas": torch.zeros(12, 4, 5)}, ValueError, r"deltas .*\[12, 4, 5\]"),
        ({"deltas": torch.zeros(2, 8, 4, 5)}, ValueError, "deltas must have 12 channels"),
        ({"deltas": torch.zeros(2, 12, 4, 5).double()}, TypeError, "deltas .*float64"),
        ({"logits": torch.zeros(2, 9, 4, 5)}, ValueError, r"logits .*\[2, 3 or 6, 4, 5\].*\[2, 9, 4, 5\]"),
        ({"logits": None}, TypeError, "logits .*NoneType"),
        ({"logits": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "logits is on meta"),
        ({"cell_anchors": torch.zeros(3, 5)}, ValueError, r"cell_anchors .*\[3, 5\]"),
        ({"sizes": torch.zeros(2, 3).long()}, ValueError, r"sizes .*\[2, 2\].*\[2, 3\]"),
        ({"sizes": torch.zeros(2, 2)}, TypeError, "sizes must be int64"),
        ({"min_side": torch.zeros(3)}, ValueError, r"min_side .*\[2\].*\[3\]"),
        ({"min_side": torch.zeros(2).long()}, TypeError, "min_side .*int64"),
        ({"stride": 16}, TypeError, "stride .*16"),
        ({"stride": (1.5, 2)}, TypeError, "stride .*1.5"),
        ({"clamp": "4"}, TypeError, "clamp .*'4'"),
        ({"clamp": float("nan")}, ValueError, "clamp .*NaN"),
        ({"min_side": [1.0]}, TypeError, r"min_side .*\[1.0\]"),
        ({"stride": (16, 0)}, ValueError, "stride must be at least 1"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, words):
    valid = {
        "deltas": torch.zeros(2, 12, 4, 5),
        "logits": torch.zeros(2, 3, 4, 5),
        "cell_anchors": torch.zeros(3, 4),
        "sizes": torch.zeros(2, 2).long(),
        "stride": (16, 16),
    }
    with pytest.raises(error, match=words):
        ops.decode(**(valid | arguments))


@pytest.mark.kernel
@pytest.mark.parametrize("clamp", [INF, 0.5])
@pytest.mark.parametrize("num_logits", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_cpu(kernel_device, dtype, layout, num_logits, clamp):
    for batch, num_anchors, height, width in ((1, 1, 1, 1), (2, 3, 5, 9), (1, 9, 7, 5)):
        deltas, logits = head(batch, num_anchors, num_logits, height, width, dtype)
        deltas, logits = (x.contiguous(memory_format=layout) for x in (deltas, logits))
        sizes = torch.tensor([[70, 90], [50, 61]])[:batch]
        inputs = (deltas, logits, cell_anchors(num_anchors), sizes, torch.tensor([16.0, 7.0])[:batch])
        actual = decode_cuda(*(x.to(kernel_device) for x in inputs), 16, 12, clamp)
        assert_decoded(actual, decode_cpu(*inputs, 16, 12, clamp))


@pytest.mark.kernel
def test_kernel_takes_slices_and_nothing(kernel_device):
    deltas, logits = (x.to(kernel_device) for x in head(4, 2, 2, 6, 8))
    anchors, sizes = cell_anchors(2).to(kernel_device), torch.tensor([[60, 70], [50, 40]], device=kernel_device)
    inputs = (deltas[::2, :, 1:4, ::2], logits[::2, :, 1:4, ::2], anchors, sizes, torch.zeros(2, device=kernel_device))
    assert_decoded(decode_cuda(*inputs, 16, 16, CLAMP), decode_cpu(*(x.cpu() for x in inputs), 16, 16, CLAMP))
    boxes, scores = decode_cuda(deltas[:2, :, :0], logits[:2, :, :0], *inputs[2:], 16, 16, CLAMP)
    assert boxes.shape == (2, 0, 4)
    assert scores.shape == (2, 0)


@pytest.mark.kernel
def test_kernel_on_what_is_not_finite(kernel_device):
    bad = torch.tensor([NAN, INF, -INF, 200.0, -200.0, 0.0])
    deltas = torch.stack(torch.meshgrid(bad, bad, bad, bad, indexing="ij")).reshape(1, 4, 36, 36)
    logits = bad.repeat(216).reshape(1, 1, 36, 36)
    sizes, anchors = torch.tensor([[300, 400]]), torch.tensor([[0.0, 0.0, 20.0, 10.0]])
    inputs = (deltas, logits, anchors, sizes, torch.tensor([2.0]))
    for clamp in (INF, CLAMP):
        actual = decode_cuda(*(x.to(kernel_device) for x in inputs), 8, 8, clamp)
        assert torch.isfinite(actual[0]).all()
        assert_decoded(actual, decode_cpu(*inputs, 8, 8, clamp))


def test_no_anchors_give_no_boxes():
    cells = torch.zeros(2, 0, 4, 5)
    found = ops.decode(cells, cells, torch.zeros(0, 4), torch.ones(2, 2, dtype=torch.int64), stride=(8, 8))
    assert (found.boxes.shape, found.scores.shape) == ((2, 0, 4), (2, 0))
