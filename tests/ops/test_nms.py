import itertools
import math

import numpy as np
import pytest
import torch
import torchvision

from fastdet import ops
from fastdet.ops.cpu import nms, nms_tiles
from fastdet.ops.cpu.nms import nms_cpu, round_threshold_down
from fastdet.ops.cpu.overlap import scale_apart
from fastdet.ops.cpu.sorting import argsort_descending, radix_argsort
from fastdet.ops.nms import _batched_by_padding, nms_cuda, nms_cuda_cooperative, nms_padded
from tests.helpers.checks import awkward_boxes, check_operator, check_registration, random_boxes

THRESHOLDS = (0.1, 0.3, 0.5, 0.6, 0.7, 1 / 3)


def reference(boxes, scores, threshold):
    return torchvision.ops.nms(boxes, scores, threshold)


def reference_batched(boxes, scores, groups, threshold):
    """torchvision's nms on each group alone, merged by stable score order."""
    keep = torch.zeros(len(boxes), dtype=torch.bool)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero()[:, 0]
        keep[rows[reference(boxes[rows], scores[rows], threshold)]] = True
    order = scores.argsort(descending=True, stable=True)
    return order[keep[order]]


def quantised_case(seed):
    """Few distinct scores and integer corners, so that ties in both abound."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, 90, (1,), generator=generator))
    side = (8.0, 40.0, 200.0)[seed % 3]
    boxes = random_boxes(count, side=side, generator=generator)
    if seed % 2:
        boxes = boxes.round()
    scores = torch.randint(0, 12, (count,), generator=generator) / 12
    return boxes, scores


def boxes_at(threshold):
    """Pairs of boxes whose IoU lies at the threshold, or one step of a corner off: all ways to cut a strip."""
    boxes = []
    for whole in range(1, 61):
        for part in range(1, whole):
            if abs(part / whole - threshold) < 0.02:
                row = 100.0 * len(boxes)
                boxes += [[0, row, whole, row + 10], [0, row, part, row + 10]]
                stretched = torch.tensor([0, row + 50, part, row + 60]) + 0.0
                stretched[2] = torch.nextafter(stretched[2], torch.tensor(math.inf))
                boxes += [[0, row + 50, whole, row + 60], stretched.tolist()]
    return torch.tensor(boxes)


@pytest.mark.parametrize("block", range(10))
def test_equals_torchvision_with_ties(block):
    for seed in range(100 * block, 100 * (block + 1)):
        boxes, scores = quantised_case(seed)
        threshold = THRESHOLDS[seed % len(THRESHOLDS)]
        assert torch.equal(ops.nms(boxes, scores, threshold), reference(boxes, scores, threshold)), seed


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_equals_torchvision_at_the_threshold(threshold):
    boxes = boxes_at(threshold)
    scores = torch.rand(len(boxes))
    expected = reference(boxes, scores, threshold)
    assert 0 < len(expected) < len(boxes), "the case decides nothing"
    assert torch.equal(ops.nms(boxes, scores, threshold), expected)


@pytest.mark.parametrize("threshold", [*THRESHOLDS, 0.0, 1.0])
def test_threshold_is_rounded_down(threshold):
    rounded = round_threshold_down(threshold)
    assert rounded <= threshold
    assert torch.nextafter(torch.tensor(rounded), torch.tensor(math.inf)).item() > threshold


@pytest.mark.parametrize("count", [1000, 3000])
@pytest.mark.parametrize("side", [60.0, 400.0])
def test_many_blocks(count, side):
    boxes, scores = random_boxes(count, side=side), torch.rand(count)
    assert torch.equal(ops.nms(boxes, scores, 0.5), reference(boxes, scores, 0.5))


def test_chain_is_decided_in_order():
    """Each box overlaps only its neighbors, so every second one stays: the worst case for deciding in rounds."""
    left = torch.arange(700.0) * 4
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], dim=1)
    scores = torch.linspace(1, 0, 700)
    expected = torch.arange(0, 700, 2)
    assert torch.equal(ops.nms(boxes, scores, 0.3), expected)
    assert torch.equal(reference(boxes, scores, 0.3), expected)


def test_non_finite_boxes_are_never_kept_and_suppress_nothing():
    boxes = awkward_boxes()
    scores = torch.linspace(0.1, 1, len(boxes))
    kept = ops.nms(boxes, scores, 0.5)
    finite = boxes.isfinite().all(1)
    assert finite[kept].all()
    rows = finite.nonzero()[:, 0]
    assert torch.equal(kept, rows[reference(boxes[rows], scores[rows], 0.5)])


def test_degenerate_boxes_all_stay():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [9, 9, 3, 3], [9, 9, 3, 3]])
    assert ops.nms(boxes, torch.ones(4), 0.0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [40, nms.MANY + 1])
def test_views_that_negate_and_boxes_with_gradients(count):
    """The imaginary part of a conjugate is a view with the opposite sign of its memory."""
    boxes, scores = random_boxes(count, side=200), torch.rand(count)
    boxes_view = torch.complex(torch.zeros_like(boxes), -boxes).conj().imag
    scores_view = torch.complex(torch.zeros_like(scores), -scores).conj().imag
    assert boxes_view.is_neg()
    assert scores_view.is_neg()
    groups = torch.arange(count) % 3
    expected, expected_batched = reference(boxes, scores, 0.5), reference_batched(boxes, scores, groups, 0.5)
    boxes.requires_grad_()
    assert torch.equal(ops.nms(boxes, scores, 0.5), expected)
    assert torch.equal(ops.batched_nms(boxes, scores, groups, 0.5), expected_batched)
    for max_keep in (None, count):
        assert torch.equal(ops.nms(boxes_view, scores_view, 0.5, max_keep), expected)
        assert torch.equal(ops.batched_nms(boxes_view, scores_view, groups, 0.5, max_keep), expected_batched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    boxes, scores = random_boxes(50).to(dtype), torch.rand(50).to(dtype)
    assert torch.equal(ops.nms(boxes, scores, 0.5), reference(boxes.float(), scores.float(), 0.5))


def test_layout_and_emptiness():
    boxes, scores = random_boxes(2, 40)[0], torch.rand(40, 2)[:, 0]
    strided = boxes.t().contiguous().t()
    assert torch.equal(ops.nms(strided, scores, 0.5), reference(boxes, scores.contiguous(), 0.5))
    empty = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert empty.shape == (0,)
    assert empty.dtype == torch.int64
    assert ops.batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5).shape == (0,)


@pytest.mark.parametrize("seed", range(60))
def test_batched_equals_torchvision_group_by_group(seed):
    boxes, scores = quantised_case(seed)
    groups = torch.randint(-3, (1, 4, 40)[seed % 3] - 2, (len(boxes),)) * 1000
    expected = reference_batched(boxes, scores, groups, 0.5)
    assert torch.equal(ops.batched_nms(boxes, scores, groups, 0.5), expected)


@pytest.mark.parametrize("little", [0, 1 << 16], ids=["by sizes", "all at once"])
@pytest.mark.parametrize("max_keep", [None, 7])
def test_groups_that_are_padded_as_on_a_gpu(monkeypatch, little, max_keep):
    monkeypatch.setattr("fastdet.ops._groups._LITTLE", little)
    generator = torch.Generator().manual_seed(3)
    for count, ids in ((1, 1), (40, 40), (300, 5), (400, 2)):
        boxes, scores = random_boxes(count, generator=generator), torch.rand(count, generator=generator)
        # One group is most of them.
        groups = (torch.rand(count, generator=generator) ** 4 * ids).long() * 3 - 5
        expected = reference_batched(boxes, scores, groups, 0.5)[:max_keep]
        assert torch.equal(_batched_by_padding(boxes, scores, groups, 0.5, max_keep), expected)


@pytest.mark.parametrize("count", [1, 2, 33, 65, 160, 161, 400, nms.MANY + 1])
@pytest.mark.parametrize("ids", [[7], [-3, 2**40], [0, 1, 2], list(range(-9, 9)), list(range(0, 900, 10))])
def test_batched_on_awkward_boxes_in_few_and_many_groups(count, ids):
    """Some are inverted, without area or not finite; many scores are equal."""
    boxes, scores = random_boxes(count, side=60), torch.rand(count).mul(20).round()
    boxes[::7] = awkward_boxes().repeat(count, 1)[: len(boxes[::7])]
    groups = torch.tensor(ids)[torch.randint(len(ids), (count,))]
    kept = reference_batched(boxes, scores, groups, 0.4)
    expected = kept[boxes[kept].isfinite().all(1)]
    assert torch.equal(ops.batched_nms(boxes, scores, groups, 0.4), expected)
    assert torch.equal(ops.batched_nms(boxes, scores, groups, 0.4, 5), expected[:5])


@pytest.mark.parametrize("count", [20, 100, 400])
def test_batched_at_the_threshold_and_with_scores_that_are_not_a_number(count):
    for threshold in THRESHOLDS:
        boxes = boxes_at(threshold)[:count]
        scores, groups = torch.rand(len(boxes)), torch.arange(len(boxes)) // 2 % 3
        scores[::5] = math.nan
        expected = reference_batched(boxes, scores, groups, threshold)
        assert torch.equal(ops.batched_nms(boxes, scores, groups.to(torch.uint8), threshold), expected)


@pytest.mark.parametrize("threshold", [1e-5, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 3e8])
@pytest.mark.parametrize("distance", [1, 10**12])
@pytest.mark.parametrize("groups", [2, 5, 8])
def test_groups_scaled_apart_equal_each_alone(groups, distance, scale, threshold):
    generator = torch.Generator().manual_seed(groups)
    corner = torch.rand(200, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 4 + torch.rand(200, 2, generator=generator) * 16], dim=1) * scale
    scores = torch.randint(0, 90, (200,), generator=generator) / 90
    ids = torch.randint(groups, (200,), generator=generator) * distance - 5
    scaled = scale_apart(boxes, ids, sorted(set(ids.tolist())), threshold)
    together = ids[:, None] == ids
    assert torch.equal(ops.box_iou(boxes, boxes)[together], ops.box_iou(scaled, scaled)[together])
    assert (ops.box_iou(scaled, scaled)[~together] <= threshold).all()
    assert torch.equal(ops.batched_nms(boxes, scores, ids, threshold), reference_batched(boxes, scores, ids, threshold))


@pytest.mark.parametrize(
    "box", [[3, 3, 3, 9], [9, 3, 4, 9], [0, 0, math.inf, 9], [math.nan, 0, 9, 9], [0, 0, 1e-30, 9]]
)
def test_groups_are_not_scaled_where_an_overlap_would_change(box):
    boxes, ids = torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9]] * 100), torch.arange(200) % 3
    assert scale_apart(boxes, ids, [0, 1, 2], 0.5) is not None
    assert scale_apart(boxes, ids, [0, 1, 2], 0.0) is None
    boxes[7] = torch.tensor(box)
    assert scale_apart(boxes, ids, [0, 1, 2], 0.5) is None
    given = boxes, torch.arange(200.0), ids
    finite = torch.isfinite(given[0]).all(1).nonzero()[:, 0]
    expected = finite[reference_batched(*(part[finite] for part in given), 0.5)]
    assert torch.equal(ops.batched_nms(*given, 0.5), expected)


@pytest.mark.parametrize("count", [30, 700])
@pytest.mark.parametrize("max_keep", [0, 1, 7, 10_000])
def test_max_keep_takes_the_first(count, max_keep):
    boxes, scores = random_boxes(count, side=60), torch.rand(count)
    assert torch.equal(ops.nms(boxes, scores, 0.5, max_keep), reference(boxes, scores, 0.5)[:max_keep])
    groups = torch.arange(count) % 3
    expected = reference_batched(boxes, scores, groups, 0.5)[:max_keep]
    assert torch.equal(ops.batched_nms(boxes, scores, groups, 0.5, max_keep), expected)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_of_near_boxes_equal_the_operator(monkeypatch, seed):
    """Boxes of any scale and density, in tiles and blocks of several sizes, with huge, inverted and equal ones."""
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(nms, "MANY", 100)
    monkeypatch.setattr(nms_tiles, "_BLOCK", (256, 33, 5)[seed % 3])
    monkeypatch.setattr(nms_tiles, "_LANES", (32, 8)[seed % 2])
    count, threshold = 101 + 300 * (seed % 4), (0.0, 0.3, 0.7, 1 / 3, 1.0)[seed % 5]
    corner = torch.rand(count, 2, generator=generator) * 10.0 ** (seed % 6)
    boxes = torch.cat([corner, corner + 10 * torch.rand(count, 2, generator=generator) ** 2], 1)
    boxes = boxes.round() if seed % 2 else boxes
    boxes[::17] = boxes[0]
    boxes[5::31] = boxes[5::31, [2, 1, 0, 3]]
    boxes[7::53] *= 1e18
    boxes[8::53] *= 3e32
    scores = (torch.rand(count, generator=generator) * 50).round()
    expected = reference(boxes, scores, threshold)
    for most in (count, 40, 1):
        index, number = nms_cpu(boxes[None], torch.ones(1, count, dtype=torch.bool), threshold, most, scores[None])
        assert torch.equal(index[0, : int(number)], expected[:most])
    assert torch.equal(ops.nms(boxes, scores, threshold), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 17, 3000])
def test_radix_sort_orders_as_torch_does(count):
    values = torch.randn(count) * 10.0 ** torch.randint(-30, 30, (count,))
    for special in (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0):
        values[torch.rand(count) < 0.1] = special
    assert argsort_descending(values.numpy()).tolist() == values.argsort(descending=True, stable=True).tolist()
    keys = torch.randint(2**32, (count,)).numpy().astype(np.uint32)
    assert radix_argsort(keys).tolist() == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize("sizes", [[20] * 15, [60, 50, 40] + [3] * 20, [90] + [1] * 30, [33] * 12 + [64, 0, 0]])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_many_groups_side_by_side_equal_each_alone(monkeypatch, sizes, threshold):
    """Groups of unequal sizes, pair by pair and in tiles of one row and of many, with gaps and boxes not valid."""
    boxes = random_boxes(len(sizes), max(sizes), side=40).round()
    boxes[0, 3] = math.nan
    valid = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    valid &= torch.rand(valid.shape) < 0.9
    for few, tile, first_rows in ((1, 100, 1), (1, 500, 7), (1, nms.TILE, 64), (64, 100, 1), (100, nms.TILE, 64)):
        monkeypatch.setattr(nms, "_FEW", few)
        monkeypatch.setattr(nms, "TILE", tile)
        monkeypatch.setattr(nms, "_ROWS", first_rows)
        index, count = nms_cpu(boxes, valid, threshold, 64)
        for group, mask in enumerate((valid & boxes.isfinite().all(2)).unbind()):
            rows = mask.nonzero()[:, 0]
            expected = rows[reference(boxes[group][rows], torch.linspace(1, 0, len(rows)), threshold)][:64]
            assert torch.equal(index[group, : int(count[group])], expected)


def test_padded_groups_are_independent_and_stop_at_max_keep():
    boxes, scores, valid = random_boxes(5, 80, side=60), torch.rand(5, 80).mul(20).round(), torch.rand(5, 80) < 0.7
    valid[3] = False
    for max_keep in (1, 7, 80, 100):
        kept = nms_padded(boxes, scores, 0.4, max_keep, valid)
        assert kept.index.shape == (5, max_keep)
        for group in range(5):
            rows = valid[group].nonzero()[:, 0]
            expected = rows[reference(boxes[group, rows], scores[group, rows], 0.4)][:max_keep]
            count = int(kept.count[group])
            assert torch.equal(kept.index[group, :count], expected)
            assert (kept.index[group, count:] == 0).all()


def test_presorted_rows_are_not_sorted_again():
    boxes, scores = random_boxes(2, 60, side=50), torch.rand(2, 60)
    order = scores.argsort(dim=1, descending=True)
    in_order = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    presorted = nms_padded(in_order, scores.gather(1, order), 0.5, 60, presorted=True)
    plain = nms_padded(boxes, scores, 0.5, 60)
    assert torch.equal(presorted.count, plain.count)
    assert torch.equal(order.gather(1, presorted.index)[plain.valid], plain.index[plain.valid])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [3, 90, nms.MANY + 1])
def test_boxes_that_need_a_gradient_are_taken(count):
    boxes, scores, groups = random_boxes(count, side=60), torch.rand(count), torch.arange(count) % 3
    leaves = boxes.clone().requires_grad_(), scores.clone().requires_grad_()
    assert torch.equal(ops.nms(*leaves, 0.5), ops.nms(boxes, scores, 0.5))
    assert torch.equal(ops.batched_nms(*leaves, groups, 0.5), ops.batched_nms(boxes, scores, groups, 0.5))


def test_padded_form_checks_its_arguments_and_widens():
    boxes, scores = random_boxes(2, 50, side=40), torch.rand(2, 50)
    halves = nms_padded(boxes.bfloat16(), scores, 0.5, 50)
    assert torch.equal(halves.index, nms_padded(boxes.bfloat16().float(), scores, 0.5, 50).index)
    assert torch.equal(
        nms_padded(boxes.clone().requires_grad_(), scores, 0.5, 50).count, nms_padded(boxes, scores, 0.5, 50).count
    )
    for change, words in (
        ({"boxes": boxes[0]}, r"boxes .*\[50, 4\]"),
        ({"scores": scores[:, :3]}, r"scores .*\[2, 3\]"),
        ({"iou_threshold": 7.0}, "iou_threshold .*7"),
        ({"max_keep": -1}, "max_keep .*-1"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, r"valid .*\[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            nms_padded(**{"boxes": boxes, "scores": scores, "iou_threshold": 0.5, "max_keep": 9, **change})


def test_operator_contract():
    check_operator(torch.ops.fastdet.nms, random_boxes(3, 20), torch.rand(3, 20) < 0.8, 0.5, 9, torch.rand(3, 20))
    boxes, scores = random_boxes(20), torch.rand(20)
    check_registration(torch.ops.fastdet.nms_indices, boxes, scores, 0.5, None)
    check_registration(torch.ops.fastdet.batched_nms_indices, boxes, scores, torch.arange(20) % 3, 0.5, 9)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes .*\[3, 5\]"),
        ({"boxes": torch.zeros(3, 4).long()}, TypeError, "boxes .*int64"),
        ({"scores": torch.zeros(2)}, ValueError, r"scores .*\[2\]"),
        ({"scores": torch.zeros(3, device="meta")}, ValueError, "scores is on meta"),
        ({"max_keep": -1}, ValueError, "max_keep .*-1"),
        ({"iou_threshold": math.nan}, ValueError, "iou_threshold must not be NaN"),
        ({"iou_threshold": None}, TypeError, "iou_threshold .*None"),
        ({"iou_threshold": True}, TypeError, "iou_threshold .*True"),
        ({"max_keep": 1.5}, TypeError, "max_keep .*1.5"),
        ({"boxes": torch.zeros(3, 4).to_sparse()}, TypeError, "boxes .*sparse"),
        ({"idxs": torch.zeros(2).long()}, ValueError, r"idxs .*\[2\]"),
        ({"idxs": torch.zeros(3) * 1j}, TypeError, "idxs .*complex64"),
    ],
)
def test_bad_input_names_the_argument(change, error, words):
    fitting = {"boxes": random_boxes(3), "scores": torch.rand(3), "idxs": torch.zeros(3).long(), "iou_threshold": 0.5}
    with pytest.raises(error, match=words):
        ops.batched_nms(**{**fitting, **change})


def small_config(**changes):
    """Small chunks, so that few boxes pass through all that many would."""
    from fastdet.kernels import nms as kernel

    config = kernel.Config(
        settled=32, chunk=32, overlap_rows=32, step=32, steps=1, filter_rows=16, filter_kept=8, filter_span=16,
        warps=1, at_once=True, finish_rows=32, finish_kept=8, finish_warps=1,
    )  # fmt: skip
    return config._replace(**changes)


def assert_kernel_equals_cpu(device, boxes, valid, threshold, max_keep, suppress=nms_cuda):
    expected = nms_cpu(boxes, valid, threshold, max_keep)
    actual = suppress(boxes.to(device), valid.to(device), threshold, max_keep)
    assert torch.equal(actual[0].cpu(), expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])


both_forms = pytest.mark.parametrize("suppress", [nms_cuda, nms_cuda_cooperative])


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("seed", range(12))
def test_kernel_equals_cpu(kernel_device, monkeypatch, seed, suppress):
    from fastdet.kernels import nms as kernel

    settled = (32, 64, 128)[seed % 3]
    small = small_config(settled=settled, step=(32, 64)[seed % 2], steps=seed % 4, at_once=seed % 3 != 1)
    monkeypatch.setattr(kernel, "config", lambda *sizes: small)
    groups, count, side = 2, (1, 33, 64, 129)[seed % 4], (20.0, 60.0, 200.0)[seed % 3]
    boxes, valid = random_boxes(groups, count, side=side), torch.rand(groups, count) < 0.9
    for max_keep in (5, count):
        threshold = THRESHOLDS[seed % len(THRESHOLDS)]
        assert_kernel_equals_cpu(kernel_device, boxes, valid, threshold, max_keep, suppress)


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("count", [1, 65, 100])
def test_kernel_equals_cpu_with_a_program_a_group(kernel_device, monkeypatch, count, rows):
    """What is kept of a group fills a block, none of it, or runs past the last that is wanted."""
    from fastdet.kernels import nms as kernel

    alone = small_config(settled=0, chunk=0, step=0, steps=0, finish_rows=rows)
    monkeypatch.setattr(kernel, "config", lambda *sizes: alone)
    boxes = torch.stack([random_boxes(count, side=20), random_boxes(count, side=200), random_boxes(count, side=60)])
    valid = torch.rand(3, count) < 0.9
    valid[2, :70] = False
    for max_keep in (5, count):
        assert_kernel_equals_cpu(kernel_device, boxes, valid, 0.5, max_keep)


@pytest.mark.kernel
@pytest.mark.parametrize("steps", [0, 2, "cooperative"])
@pytest.mark.parametrize(
    ("count", "shift", "settled"),
    [(63, 0.2, 32), (64, 0.6, 32), (65, 2.0, 32), (97, 0.6, 32), (97, 0.2, 64), (129, 0.6, 64), (129, 2.0, 64)],
)
def test_kernel_on_rows_of_boxes(kernel_device, monkeypatch, steps, shift, count, settled):
    """Each box overlaps the next, or a few, or none: as many survive as are settled at a time, one more or one fewer;
    one group ends early, one has no valid box at first, and one none at all."""
    from fastdet.kernels import nms as kernel

    suppress = nms_cuda_cooperative if steps == "cooperative" else nms_cuda
    small = small_config(settled=settled, step=64, steps=0 if steps == "cooperative" else steps)
    monkeypatch.setattr(kernel, "config", lambda *sizes: small)
    corner = torch.arange(count)[:, None] * torch.tensor([shift, 0.0])
    boxes = torch.cat([corner, corner + 1], 1).expand(4, -1, -1)
    place = torch.arange(count)
    valid = torch.stack([place >= 0, place < 40, place > 34, place < 0])
    for max_keep in (count, 33):
        assert_kernel_equals_cpu(kernel_device, boxes, valid, 0.5, max_keep, suppress)


@pytest.mark.kernel
@both_forms
def test_kernel_leaves_its_counters_ready_for_a_replay(kernel_device, monkeypatch, suppress):
    from fastdet.kernels import nms, nms_cooperative

    kernel = nms if suppress is nms_cuda else nms_cooperative
    monkeypatch.setattr(nms, "config", lambda *sizes: small_config(settled=64))
    found, launch = [], kernel.launch

    def twice(*args, **kwargs):
        launch(*args, **kwargs)
        found.append((kwargs["index"].clone(), kwargs["count"].clone()))
        launch(*args, **kwargs)

    monkeypatch.setattr(kernel, "launch", twice)
    boxes, valid = random_boxes(2, 90, side=60), torch.ones(2, 90, dtype=torch.bool)
    index, count = suppress(boxes.to(kernel_device), valid.to(kernel_device), 0.5, 90)
    assert torch.equal(index, found[0][0])
    assert torch.equal(count, found[0][1])


@pytest.mark.parametrize(
    ("groups", "count", "max_keep", "most"),
    [
        (1, 12000, 2000, 8),
        (1, 6000, 300, 6),
        (1440, 300, 300, 1),
        (5, 1024, 1024, 2),
        (5, 2000, 1000, 2),
        (1, 1025, 1025, 1),
    ],
)
def test_suppression_takes_few_launches(groups, count, max_keep, most):
    launches = pytest.importorskip("tools.launches")
    boxes, valid = torch.zeros(groups, count, 4), torch.ones(groups, count, dtype=torch.bool)
    with launches.record_launches() as recorded:
        nms_cuda(boxes, valid, 0.7, max_keep)
    assert len(recorded) <= most


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_kernel_decides_as_torchvision_at_the_threshold(kernel_device, threshold, suppress):
    boxes = boxes_at(threshold)[:200]
    expected = reference(boxes, torch.linspace(1, 0, len(boxes)), threshold)
    valid = torch.ones(1, len(boxes), dtype=torch.bool, device=kernel_device)
    arguments = boxes[None].to(kernel_device), valid, threshold, len(boxes)
    index, count = suppress(*arguments)
    assert torch.equal(index[0, : int(count[0])].cpu(), expected)


@pytest.mark.kernel
@both_forms
def test_kernel_on_awkward_boxes(kernel_device, suppress):
    boxes = awkward_boxes()[None]
    valid = torch.ones(1, boxes.shape[1], dtype=torch.bool)
    assert_kernel_equals_cpu(kernel_device, boxes, valid, 0.3, 11, suppress)


@pytest.mark.kernel
def test_kernel_on_boxes_inverted_along_one_axis(kernel_device):
    """Their areas are negative, and so may be the union with another box, which they still do not overlap."""
    boxes = torch.tensor([[0, 0, 10, -20], [50, 50, 60, 60], [30, 0, 0, 30], [51, 51, 59, 59], [0, 0, 10, 10.0]])
    expected = reference(boxes, torch.linspace(1, 0, 5), 0.5)
    assert expected.tolist() == [0, 1, 2, 4]
    valid = torch.ones(1, 5, dtype=torch.bool)
    for index, count in (
        nms_cpu(boxes[None], valid, 0.5, 5),
        nms_cuda(boxes[None].to(kernel_device), valid.to(kernel_device), 0.5, 5),
    ):
        assert index[0, : int(count[0])].tolist() == expected.tolist()


@pytest.mark.kernel
def test_kernel_takes_empty_input(kernel_device):
    for groups, count, max_keep in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        boxes = torch.zeros(groups, count, 4, device=kernel_device)
        valid = torch.ones(groups, count, dtype=torch.bool, device=kernel_device)
        index, kept = nms_cuda(boxes, valid, 0.5, max_keep)
        assert index.shape == (groups, max_keep)
        assert (kept == 0).all()


def test_block_sizes_hold_what_the_kernels_assume():
    from fastdet.kernels import nms as kernel

    for groups, count in itertools.product((1, 255, 256, 2000), (1, 31, 33, 300, 1024, 1025, 6000, 12000, 100_000)):
        for max_keep in (1, 300, 2000, count):
            config = kernel.config(groups, count, max_keep)
            powers = config._replace(steps=0)
            assert all(size & (size - 1) == 0 for size in powers)
            assert config.finish_rows >= 32
            if not config.settled:
                assert config.steps == config.step == 0
                continue
            assert config.settled >= config.chunk >= config.overlap_rows >= 32
            assert config.step >= config.filter_rows
            # The last launch is not made where no data can leave it something to do.
            needed = kernel.most_steps(count, config.settled, config.step)
            assert config.steps <= needed
            if max_keep == count:
                assert config.steps == needed


def test_the_scratch_of_many_groups_is_bounded():
    """Sixteen images with the blocks of classes that 1000 proposals of 1202 classes are suppressed in."""
    from fastdet.kernels import nms as kernel

    settled = {groups: kernel.config(groups, 1000, 1000).settled for groups in (1, 255, 16 * 20, 1_000_000)}
    assert settled == {1: 1024, 255: 1024, 16 * 20: 0, 1_000_000: 0}
