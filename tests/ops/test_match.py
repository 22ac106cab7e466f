import sys

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder, Matcher

from fastdet import ops
from fastdet.ops.cpu import match
from fastdet.ops.match import match_cpu, match_cuda
from tests.helpers.checks import assert_close, awkward_boxes, check_operator, random_boxes

ONES = [1.0, 1.0, 1.0, 1.0]


def loop_iou(first, second, dtype):
    """IoU of two boxes, each step rounded to `dtype`; 0 where it is undefined."""
    first, second = (np.asarray(box, dtype=dtype) for box in (first, second))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return dtype(0)
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if not (width > 0 and height > 0):
        return dtype(0)
    area1, area2 = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / (area1 + area2 - width * height)


def loop_match(candidates, gt_boxes, gt_valid, valid, high, low, allow_low_quality, dtype=np.float32):
    """The rules for one image, one pair after the other."""
    high, low = np.float32(high), np.float32(low)
    overlaps = [
        [loop_iou(box, gt, dtype) if ok and gt_ok else dtype(0) for gt, gt_ok in zip(gt_boxes, gt_valid, strict=True)]
        for box, ok in zip(candidates, valid, strict=True)
    ]
    index, iou, label = [], [], []
    for ok, row in zip(valid, overlaps, strict=True):
        best = max(row, default=dtype(0))
        index.append(row.index(best) if best > 0 else 0)
        iou.append(float(best))
        label.append(-1 if not ok else 1 if best >= high else 0 if best < low else -1)
    if allow_low_quality:
        for gt in range(len(gt_boxes)):
            best = max((row[gt] for row in overlaps), default=dtype(0))
            for k, row in enumerate(overlaps):
                if best > 0 and row[gt] == best:
                    label[k] = 1
    return torch.tensor(index, dtype=torch.int64), torch.tensor(iou), torch.tensor(label, dtype=torch.int64)


def case(batch, num_candidates, num_gt, seed=0, whole=True):
    """Boxes with whole corners, so that equal overlaps abound, and masks that leave out some of both sides."""
    generator = torch.Generator().manual_seed(seed)
    candidates = random_boxes(batch, num_candidates, side=30.0, generator=generator)
    gt_boxes = random_boxes(batch, num_gt, side=30.0, generator=generator)
    if whole:
        candidates, gt_boxes = candidates.round(), gt_boxes.round()
    gt_valid = torch.rand(batch, num_gt, generator=generator) > 0.2
    valid = torch.rand(batch, num_candidates, generator=generator) > 0.2
    return candidates, gt_boxes, gt_valid, valid


def assert_equal(actual, expected):
    """Bit for bit, but for the deltas, if there are any to compare with."""
    for name, found, wanted in zip(("index", "iou", "label"), actual, expected, strict=False):
        assert torch.equal(found.cpu(), wanted.cpu()), name
    for found, wanted in zip(actual[3:], expected[3:], strict=False):
        assert_close(found.cpu(), wanted)


def assert_equals_loop(result, candidates, gt_boxes, gt_valid, valid, high, low, allow_low_quality):
    for image in range(len(gt_boxes)):
        args = (x[image].tolist() for x in (candidates, gt_boxes, gt_valid, valid))
        expected = loop_match(*args, high, low, allow_low_quality)
        assert_equal([part[image] for part in result], expected)


SIZES = [(0, 3), (3, 0), (1, 1), (7, 1), (37, 5), (101, 23)]


@pytest.fixture(params=[0, match.FEW_PAIRS], ids=["tiles", "at once"])
def few_pairs(request, monkeypatch):
    """Both ways to compare: tile by tile, as many pairs, and all pairs at once, as few."""
    monkeypatch.setattr(match, "FEW_PAIRS", request.param)


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize(("num_candidates", "num_gt"), SIZES)
def test_equals_a_loop(num_candidates, num_gt, allow_low_quality):
    inputs = case(2, num_candidates, num_gt)
    candidates, gt_boxes, gt_valid, valid = inputs
    settings = {"high": 0.5, "low": 0.2, "allow_low_quality": allow_low_quality}
    result = ops.match(candidates, gt_boxes, gt_valid, valid=valid, **settings)
    assert_equals_loop(result, *inputs, *settings.values())
    assert (result.index.dtype, result.iou.dtype, result.label.dtype) == (torch.int64, torch.float32, torch.int64)


@pytest.mark.usefixtures("few_pairs")
def test_iou_equals_a_float64_loop():
    candidates, gt_boxes, gt_valid, valid = case(1, 60, 7, whole=False)
    result = ops.match(candidates, gt_boxes, gt_valid, valid=valid, high=0.5, low=0.2)
    args = [x[0].tolist() for x in (candidates, gt_boxes, gt_valid, valid)]
    _, iou, _ = loop_match(*args, 0.5, 0.2, False, dtype=np.float64)
    assert_close(result.iou[0], iou)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("tile", "block", "spans"), [(40, 7, 64), (64, 16, 2), (16, 16, 1), (1000, 1, 3), (19, 1, 64)])
def test_tiles_do_not_show(monkeypatch, seed, tile, block, spans):
    inputs = case(2, 83, 19, seed)
    expected = match_cpu(*inputs, None, 0.5, 0.2, True, 0.5, ONES)
    assert_equals_loop(expected, *inputs, 0.5, 0.2, True)
    monkeypatch.setattr(match, "FEW_PAIRS", 0)
    monkeypatch.setattr(match, "TILE", tile)
    monkeypatch.setattr(match, "MIN_ACROSS", block)
    monkeypatch.setattr(match, "MAX_SPANS", spans)
    assert_equal(match_cpu(*inputs, None, 0.5, 0.2, True, 0.5, ONES), expected)


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_equals_torchvision(allow_low_quality, whole):
    candidates, gt_boxes, _, _ = case(1, 400, 30, whole=whole)
    grow = torch.tensor([0.0, 0.0, 1.0, 1.0])
    candidates, gt_boxes = candidates + grow, gt_boxes + grow
    result = ops.match(candidates, gt_boxes, high=0.7, low=0.3, allow_low_quality=allow_low_quality)
    theirs = Matcher(0.7, 0.3, allow_low_quality)(torchvision.ops.box_iou(gt_boxes[0], candidates[0]))
    label = torch.where(theirs >= 0, 1, torch.where(theirs == Matcher.BELOW_LOW_THRESHOLD, 0, -1))
    assert torch.equal(result.label[0], label)
    assert torch.equal(result.index[0][label == 1], theirs[label == 1])


@pytest.mark.usefixtures("few_pairs")
def test_thresholds_are_rounded_to_fp32():
    gt_boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]])
    candidates = torch.tensor([[0.0, 0.0, 10.0, side] for side in (7.0, 6.999, 3.0, 2.999)])
    result = ops.match(candidates, gt_boxes, high=0.7, low=0.3)
    assert result.iou[0, 0] == np.float32(0.7)
    assert float(result.iou[0, 0]) < 0.7, "the comparison is not one of doubles"
    assert result.label.tolist() == [[1, -1, -1, 0]]


@pytest.mark.usefixtures("few_pairs")
def test_candidates_of_one_and_of_many_images_and_any_layout():
    candidates, gt_boxes, gt_valid, valid = case(3, 41, 6)
    settings = {"high": 0.5, "low": 0.3, "allow_low_quality": True}
    batched = ops.match(candidates, gt_boxes, gt_valid, valid=valid, **settings)
    for image in range(3):
        rows = slice(image, image + 1)
        alone = ops.match(candidates[image], gt_boxes[rows], gt_valid[rows], valid=valid[rows], **settings)
        assert_equal([part[rows] for part in batched], alone)
    shared = ops.match(candidates[0], gt_boxes, gt_valid, valid=valid, **settings)
    assert_equal(shared, ops.match(candidates[:1].expand(3, -1, -1), gt_boxes, gt_valid, valid=valid, **settings))
    strided = candidates.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_equal(ops.match(strided, gt_boxes, gt_valid, valid=valid, **settings), batched)


@pytest.mark.usefixtures("few_pairs")
def test_left_out_masks_leave_nothing_out():
    candidates, gt_boxes, gt_valid, valid = case(2, 20, 4)
    everything = ops.match(
        candidates, gt_boxes, torch.ones_like(gt_valid), valid=torch.ones_like(valid), high=0.5, low=0.3
    )
    assert_equal(ops.match(candidates, gt_boxes, high=0.5, low=0.3), everything)
    nothing = ops.match(
        candidates, gt_boxes, torch.zeros_like(gt_valid), high=0.5, low=0.3, valid=valid, allow_low_quality=True
    )
    assert_equal(nothing, (torch.zeros(2, 20).long(), torch.zeros(2, 20), valid.long() - 1))


@pytest.mark.usefixtures("few_pairs")
def test_awkward_boxes_overlap_nothing():
    boxes = awkward_boxes()
    masks = torch.ones(1, 11, dtype=torch.bool)
    result = ops.match(boxes, boxes[None], high=0.5, low=0.1, allow_low_quality=True)
    assert_equals_loop(result, boxes[None], boxes[None], masks, masks, 0.5, 0.1, True)
    assert torch.isfinite(result.iou).all()
    assert (result.label[0, 4:10] == 0).all()
    huge = torch.tensor([[[-3e38, -3e38, 3e38, 3e38], [1e19, 1e19, 3e19, 3e19], [0, 0, 1e-30, 1e-30]]])
    assert (ops.match(huge, huge, high=0.5, low=0.1).iou == 0).all(), "areas that overflow or vanish"


def loop_covered(box, ignored):
    """The largest share of the area of `box` inside one of the `ignored`, in fp32."""
    shares = [np.float32(0)]
    for region in ignored:
        (x1, y1, x2, y2), (u1, v1, u2, v2) = np.float32(box), np.float32(region)
        width, height = min(x2, u2) - max(x1, u1), min(y2, v2) - max(y1, v1)
        area = (x2 - x1) * (y2 - y1)
        if width > 0 and height > 0 and area > 0 and np.isfinite([area, (u2 - u1) * (v2 - v1)]).all():
            shares.append(width * height / area)
    return max(shares)


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("num_gt", [1, 6, 40])
def test_what_lies_in_ignored_boxes_is_no_negative(num_gt, share):
    candidates, gt_boxes, gt_valid, valid = case(2, 120, num_gt)
    ignore = ~gt_valid
    arguments = {"high": 0.5, "low": 0.4, "valid": valid, "allow_low_quality": True}
    plain = ops.match(candidates, gt_boxes, gt_valid, **arguments)
    result = ops.match(candidates, gt_boxes, gt_valid, gt_ignore=ignore, ignore_iof=share, **arguments)
    assert torch.equal(result.index, plain.index)
    assert torch.equal(result.iou, plain.iou)
    for image in range(2):
        ignored = gt_boxes[image][ignore[image]].tolist()
        covered = torch.tensor([float(loop_covered(box, ignored)) for box in candidates[image].tolist()])
        out = (plain.label[image] == 0) & (covered >= share)
        assert torch.equal(result.label[image], torch.where(out, -1, plain.label[image]))
        assert out.any() or not ignored


@pytest.mark.usefixtures("few_pairs")
def test_ignored_boxes_that_are_awkward_cover_nothing_they_should_not():
    boxes = awkward_boxes()
    masks = torch.ones(1, 11, dtype=torch.bool)
    result = ops.match(boxes, boxes[None], ~masks, high=0.5, low=0.1, gt_ignore=masks)
    covered = [float(loop_covered(box, boxes.tolist())) for box in boxes.tolist()]
    assert result.label[0].tolist() == [-1 if share >= 0.5 else 0 for share in covered]
    assert 0 < sum(result.label[0].tolist()) + 11 < 11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    candidates, gt_boxes, _, _ = case(1, 30, 5, whole=False)
    candidates, gt_boxes = candidates.to(dtype), gt_boxes.to(dtype)
    result = ops.match(candidates, gt_boxes, high=0.5, low=0.3)
    assert result.iou.dtype == torch.float32
    assert_equal(result, ops.match(candidates.float(), gt_boxes.float(), high=0.5, low=0.3))


def test_carries_no_gradient():
    candidates, gt_boxes, _, _ = case(1, 5, 2)
    assert not ops.match(candidates.requires_grad_(), gt_boxes.requires_grad_(), high=0.5, low=0.3).iou.requires_grad


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is counted in other units, or not at all")
def test_memory_does_not_grow_with_the_product():
    """200 000 candidates by 5000 boxes: the matrix would take 4 GB."""
    import resource

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        candidates, gt_boxes = random_boxes(200_000, side=1000.0), random_boxes(1, 5000, side=1000.0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = ops.match(candidates, gt_boxes, high=0.7, low=0.3, allow_low_quality=True)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    finally:
        torch.set_num_threads(threads)
    assert grown < 50 * 1024, f"{grown} KiB"
    some = ops.box_iou(candidates[::1000], gt_boxes[0])
    assert torch.equal(result.index[0, ::1000], some.argmax(1))


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("num_candidates", "num_gt"), [(20_000, 300), (300, 20_000)])
def test_no_tensor_is_near_the_product(num_candidates, num_gt):
    inputs = case(1, num_candidates, num_gt)
    with LargestTensor() as largest:
        match_cpu(*inputs, None, 0.7, 0.3, True, 0.5, ONES)
    assert largest.elements < 500_000


def test_operator_contract():
    candidates, gt_boxes, gt_valid, valid = case(2, 9, 3)
    check_operator(torch.ops.fastdet.match, candidates, gt_boxes, gt_valid, valid, None, 0.5, 0.3, True, 0.5, ONES)
    check_operator(
        torch.ops.fastdet.match, candidates[0], gt_boxes, gt_valid, None, ~gt_valid, 0.5, 0.3, False, 0.4, ONES
    )


BOXES, BATCH = torch.zeros(5, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"candidates": torch.zeros(5, 3)}, ValueError, r"candidates .*\[5, 3\]"),
        ({"candidates": torch.zeros(3, 5, 4)}, ValueError, r"candidates .*\[2, K, 4\].*\[3, 5, 4\]"),
        ({"candidates": BOXES.double()}, TypeError, "candidates .*float64"),
        ({"gt_boxes": torch.zeros(3, 4)}, ValueError, r"gt_boxes .*\[3, 4\]"),
        ({"gt_boxes": [[0, 0, 1, 1]]}, TypeError, "gt_boxes .*list"),
        ({"gt_boxes": BATCH.to("meta")}, ValueError, "gt_boxes is on meta"),
        ({"gt_valid": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"gt_valid .*\[2, 3\].*\[2, 4\]"),
        ({"gt_valid": torch.ones(2, 3)}, TypeError, "gt_valid must be bool"),
        ({"valid": torch.ones(5, dtype=torch.bool)}, ValueError, r"valid .*\[2, 5\].*\[5\]"),
        ({"valid": torch.ones(2, 5, dtype=torch.int64)}, TypeError, "valid must be bool"),
        ({"gt_ignore": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"gt_ignore .*\[2, 3\].*\[2, 4\]"),
        ({"gt_ignore": torch.ones(2, 3)}, TypeError, "gt_ignore must be bool"),
        ({"ignore_iof": -0.1}, ValueError, r"ignore_iof .*\[0, 1\]"),
        ({"high": 1.5}, ValueError, r"high .*\[0, 1\]"),
        ({"low": float("nan")}, ValueError, r"low .*\[0, 1\]"),
        ({"weights": (1, 1, 1)}, TypeError, r"weights .*\(1, 1, 1\)"),
        ({"weights": (1, 1, 1, 0)}, ValueError, "weights .*0"),
        ({"allow_low_quality": "yes"}, TypeError, "allow_low_quality .*'yes'"),
        ({"low": 0.6}, ValueError, "low must not exceed high"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.match(**({"candidates": BOXES, "gt_boxes": BATCH, "high": 0.5, "low": 0.3} | arguments))


def test_block_sizes_are_powers_of_two():
    kernel = pytest.importorskip("fastdet.kernels.match")
    for num_gt in (0, 1, 9, 50, 5000):
        config = kernel.config(num_gt)
        assert config.block_k == 32, "a candidate for each thread of a warp"
        assert config.block_g == 8 * config.num_warps
        assert config.block_g >= min(num_gt, 32)
        for size in config:
            assert size & (size - 1) == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_deltas_are_those_of_the_positives_alone(weights):
    candidates, gt_boxes, gt_valid, valid = case(2, 300, 9, whole=False)
    arguments = {"high": 0.5, "low": 0.2, "allow_low_quality": True, "valid": valid, "weights": weights}
    index, _, label, deltas = ops.match(candidates, gt_boxes, gt_valid, **arguments)
    positive = label == 1
    assert positive.any()
    assert (deltas[~positive] == 0).all()
    truth = torch.stack([boxes[rows] for boxes, rows in zip(gt_boxes, index, strict=True)])
    theirs = BoxCoder(weights).encode_single(truth[positive], candidates[positive])
    assert_close(deltas[positive], theirs)


@pytest.mark.usefixtures("few_pairs")
def test_a_threshold_of_zero_gives_no_deltas_without_overlap():
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 9.0, 9.0]])
    result = ops.match(boxes, boxes[None, :1], high=0.0, low=0.0)
    assert (result.label == 1).all()
    assert (result.deltas == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize(("num_candidates", "num_gt"), [(0, 3), (5, 0), (1, 1), (150, 3), (40, 70)])
def test_kernel_equals_cpu(kernel_device, num_candidates, num_gt, allow_low_quality, masked):
    candidates, gt_boxes, gt_valid, valid = case(2, num_candidates, num_gt)
    inputs = (candidates, gt_boxes, gt_valid, valid) if masked else (candidates[0], gt_boxes, gt_valid, None)
    inputs = (*inputs, ~gt_valid if masked else None)
    scalars = 0.5, 0.2, allow_low_quality, 0.4, [10.0, 10.0, 5.0, 5.0]
    actual = match_cuda(*(x if x is None else x.to(kernel_device) for x in inputs), *scalars)
    assert_equal(actual, match_cpu(*inputs, *scalars))


@pytest.mark.kernel
@pytest.mark.parametrize("whole", [False, True])
def test_kernel_equals_cpu_on_overlapping_boxes(kernel_device, whole):
    candidates, gt_boxes, gt_valid, valid = case(1, 200, 20, whole=whole)
    gt_boxes = torch.cat([gt_boxes, gt_boxes[:, :5], candidates[:, 50:60]], dim=1)
    gt_valid = torch.ones(1, 35, dtype=torch.bool)
    inputs = (candidates, gt_boxes, gt_valid, valid)
    actual = match_cuda(*(x.to(kernel_device) for x in inputs), None, 0.7, 0.3, True, 0.5, ONES)
    assert_equal(actual, match_cpu(*inputs, None, 0.7, 0.3, True, 0.5, ONES))


@pytest.mark.kernel
@pytest.mark.parametrize("exponent", [-70, -40, 40, 60])
def test_kernel_rounds_quotients_of_any_size(kernel_device, exponent):
    """Areas from the smallest numbers up to infinity, in tiles with boxes of usual sizes."""
    candidates, gt_boxes, gt_valid, _ = case(2, 70, 12, whole=False)
    gt_boxes[1, ::2] *= 2.0**exponent
    candidates[:, 35:] *= 2.0**exponent
    inputs = (candidates, gt_boxes, gt_valid)
    actual = match_cuda(*(x.to(kernel_device) for x in inputs), None, None, 0.7, 0.3, True, 0.5, ONES)
    assert_equal(actual[:3], match_cpu(*inputs, None, None, 0.7, 0.3, True, 0.5, ONES)[:3])


@pytest.mark.kernel
def test_kernel_on_awkward_and_strided_boxes(kernel_device):
    boxes = awkward_boxes()[None].to(kernel_device)
    gt_valid = torch.ones(1, 11, dtype=torch.bool, device=kernel_device)
    actual = match_cuda(boxes, boxes, gt_valid, None, None, 0.5, 0.1, True, 0.5, ONES)
    assert_equal(actual, match_cpu(boxes.cpu(), boxes.cpu(), gt_valid.cpu(), None, None, 0.5, 0.1, True, 0.5, ONES))
    strided = boxes.transpose(-1, -2).contiguous().transpose(-1, -2)
    ignored = match_cuda(boxes, boxes, ~gt_valid, None, gt_valid, 0.5, 0.1, True, 0.5, ONES)
    assert_equal(
        ignored, match_cpu(boxes.cpu(), boxes.cpu(), ~gt_valid.cpu(), None, gt_valid.cpu(), 0.5, 0.1, True, 0.5, ONES)
    )
    on_cpu = [part.cpu() for part in actual]
    assert_equal(match_cuda(strided, strided, gt_valid, None, None, 0.5, 0.1, True, 0.5, ONES), on_cpu)
