"""The arithmetic of the benchmarks: floors, percentiles, the table, the picture. What they measure is not tested."""

import os
import re
import time
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bench import between_networks, costs, plot, report, roofline, scenes, tables, timing, whole_step
from bench.timing import Times
from tools import alternatives, kernel_times

H100 = roofline.DEVICES["NVIDIA H100 80GB HBM3"]
ANCHORS = 18648
POOL = roofline.roi_pool(512 * 37 * 56, 128 * 512 * 49, 4)


@pytest.mark.parametrize(
    ("work", "microseconds"),
    [
        (roofline.decode(16 * ANCHORS, 1, 2), 3.0),
        (roofline.box_iou(12000, 12000), 192),
        (roofline.nms(1, 12000), 42),
        (POOL, 7.8),
        (POOL * 2, 15.7),
        # Launches alone: one node, and two.
        (roofline.decode(ANCHORS, 1, 2), 1.5),
        (roofline.match(18648, 50), 3.0),
    ],
)
def test_floor_on_an_h100(work, microseconds):
    assert roofline.floor_us(H100, work) == pytest.approx(microseconds, rel=0.03)


def test_no_floor_where_a_rate_is_unknown():
    cpu = roofline.this_cpu(1 << 16)
    assert roofline.floor_us(cpu, roofline.nms(1, 100)) is None
    assert roofline.floor_us(cpu, roofline.box_iou(100, 100)) > 0


def test_spread():
    assert report.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert report.spread([2.0]) == (2.0, 2.0, 2.0)


def row(
    graphed_ms: float | None = 0.25,
    floor_ms: float | None = 0.125,
    median: float = 4.0,
    op: str = "nms, first kept",
    size: str = "12000 -> 2000, IoU 0.7",
    device: str = "a device, with a comma",
    **more: Any,
) -> report.Row:
    return report.make_row(
        op=op,
        size=size,
        dtype="float32",
        device=device,
        ours=Times([0.5, 1.0, 1.5], [1.0, 2.0, 3.0]),
        theirs=Times([median / 2, median, median * 2], [median] * 3),
        graphed_ms=graphed_ms,
        floor_ms=floor_ms,
        **more,
    )


def test_row_derives_ratio_and_times_the_floor():
    assert row().ratio == 4.0
    assert row().times_floor == 2.0
    assert row(graphed_ms=None).times_floor == 8.0
    assert row(floor_ms=None).times_floor is None


def test_cpu_time_is_given_of_a_cpu_alone():
    assert (row().ours_cpu_ms, row().torchvision_cpu_ms) == (None, None)
    on_cpu = row(device="cpu, 2 threads")
    assert (on_cpu.ours_cpu_ms, on_cpu.torchvision_cpu_ms) == (2.0, 4.0)


COSTS = costs.Cost(100.0, 7, 0), costs.Cost(200.0, 90, 13)


def step_row() -> report.Row:
    times = Times([40.0, 50.0, 60.0], [50.0]), Times([80.0, 100.0, 120.0], [100.0])
    return report.make_row("model, train", "batch 4", "bfloat16", "cpu", *times, images=4, costs=COSTS)


def test_row_of_a_whole_step():
    row = step_row()
    assert (row.images_per_s, row.torchvision_images_per_s) == (80.0, 40.0)
    assert (row.peak_mib, row.torchvision_peak_mib) == (100.0, 200.0)
    assert (row.launches, row.torchvision_launches, row.host_syncs, row.torchvision_host_syncs) == (7, 90, 0, 13)
    head, line = (re.split(r"\s{2,}", line.strip()) for line in report.step_lines([row]))
    assert dict(zip(head, line, strict=True)) == {
        "op": "model, train",
        "size": "batch 4",
        "dtype": "bfloat16",
        "images/s": "80.0 / 40.0",
        "peak, MiB": "100 / 200",
        "launches": "7 / 90",
        "host syncs": "0 / 13",
    }


def test_launches_and_host_syncs_are_counted():
    launches = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"]
    host_syncs = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize"]
    neither = ["aten::add", "cudaEventRecord", "cudaStreamWaitEvent", "Memcpy HtoD", "volta_sgemm", "cudaEventQuery"]
    assert costs.count_launches_and_syncs([*launches, *host_syncs, *neither]) == (5, 4)
    assert costs.count_launches_and_syncs(["cudaMemcpy", "cudaMemcpy2D", "cudaMemcpy2DAsync"]) == (3, 2)


def test_operators_are_counted(monkeypatch):
    # Poison would be an operator of its own.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    weight = torch.ones(3, 3, requires_grad=True)

    def call() -> None:
        (weight.view(9)[2:] * 2).sum().backward()

    computing, syncing = costs.count_operators(call)
    # Times and sum; ones for the gradient of the loss, times, and zeros and a copy for that of the slice.
    assert (computing, syncing) == (6, 0)
    mask = torch.ones(3) > 0
    assert costs.count_operators(lambda: mask.any().item())[1] == 1
    assert costs.count_operators(lambda: torch.ones(3)[mask])[1] == 1
    boxes = torch.rand(700, 4)
    assert costs.count_operators(lambda: torch.ops.torchvision.nms(boxes, boxes[:, 0], 0.5))[1] == 1
    assert costs.count_operators(lambda: torch.ops.fastdet.nms(boxes[None], boxes[None, :, 0] > 0, 0.5, 9))[1] == 0


def test_memory_of_a_call():
    def call() -> Tensor:
        first = torch.zeros(1 << 20)
        second = first + 1
        del first
        return torch.zeros(1 << 18) + second[: 1 << 18]

    # Two of the large at a time; later one large and two small.
    assert costs.peak_bytes(call) == pytest.approx(8 << 20, rel=0.01)


def test_what_a_step_holds_counts_each_tensor_once():
    model = nn.Linear(100, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(100)).sum().backward()
    optimizer.step()
    model.register_buffer("again", model.weight.detach())
    # Weights and momentum.
    assert costs.persistent_bytes(costs.Step(lambda: 0, lambda: 0, model, optimizer)) == 2 * 4 * 5050
    assert (
        costs.persistent_bytes(costs.Step(lambda: 0, lambda: 0, model, optimizer, other_bytes=lambda: 7))
        == 2 * 4 * 5050 + 7
    )


@pytest.mark.parametrize("keeps_gradients", [True, False])
def test_peak_of_a_step_counts_its_gradients_once(keeps_gradients):
    model = nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        model(torch.ones(1000)).sum().backward()
        optimizer.step()
        if not keeps_gradients:
            optimizer.zero_grad()

    _, cost = costs.measure(lambda: costs.Step(run, run, model, optimizer), torch.device("cpu"))
    assert cost.peak_mib == pytest.approx(2 * 4e6 / 2**20, rel=0.02)
    assert cost.host_syncs == 0
    step = costs.Step(run, run, model, optimizer, in_operators=False)
    assert costs.measure(lambda: step, torch.device("cpu"))[1].launches is None


class Slow(torch.autograd.Function):
    """Takes 30 ms forward and 50 ms backward."""

    @staticmethod
    def forward(ctx, values):
        time.sleep(0.03)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.05)
        return gradient


class SlowLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        return Slow.apply(values * self.weight)


def test_time_between_the_networks():
    """20 ms of the 190 are neither the backbone's nor the head's, nor behind the optimizer's step."""
    model = nn.Module()
    model.backbone, model.roi_heads = SlowLayer(), nn.Module()
    model.roi_heads.box_head = SlowLayer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        pooled = model.backbone(torch.ones(3)) * 2
        time.sleep(0.02)
        model.roi_heads.box_head(pooled).sum().backward()
        optimizer.step()
        time.sleep(0.01)

    timed = between_networks.TimerOutsideNetworks(costs.Step(run, run, model, optimizer))
    assert 18 < min(timed() for _ in range(3)) < 50


SMALL = whole_step.Case("mobilenet_v2", 64, 96, 2, True, torch.float32, torch.device("cpu"), lr=0.1)


def weights_after(step: costs.Step, run: costs.Call) -> list[Tensor]:
    torch.manual_seed(1)
    run()
    return [parameter.detach().clone() for parameter in step.model.parameters()]


def test_all_ways_take_the_same_training_step():
    before = list(whole_step.build_fastdet(SMALL).parameters())
    expected = whole_step.eager(SMALL)
    after = weights_after(expected, expected.run)
    assert not all(map(torch.equal, before, after))
    for build in (whole_step.eager, whole_step.graphed):
        for name in ("run", "padded"):
            step = build(SMALL)
            torch.testing.assert_close(weights_after(step, getattr(step, name)), after)
    still = whole_step.eager(SMALL._replace(lr=0.0))
    assert all(map(torch.equal, before, weights_after(still, still.run)))


def test_all_ways_find_what_torchvision_finds():
    """But for the anchors, which differ a little: ours are not rounded and lie elsewhere in the cell."""
    case = SMALL._replace(training=False, height=160, width=224)
    ours, theirs = whole_step.eager(case), whole_step.torchvision_step(case)
    found = ours.run()
    assert sum(len(each["scores"]) for each in found) > 20
    fused = whole_step.fused(case).run()
    for one, other in zip(fused, whole_step.graphed(case).run(), strict=True):
        torch.testing.assert_close(one, other)
    # Many boxes are alike, so that rounding decides which of them are suppressed.
    assert sum(len(each["scores"]) for each in fused) == pytest.approx(
        sum(len(each["scores"]) for each in found), rel=0.1
    )
    padded = ours.padded()
    assert padded.count.tolist() == [len(each["scores"]) for each in found]
    counts = [[len(each["scores"]) for each in step()] for step in (theirs.run, theirs.padded)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == pytest.approx(sum(padded.count.tolist()), rel=0.25)


def test_torchvision_has_the_same_weights():
    ours = whole_step.build_fastdet(SMALL)
    theirs = whole_step.build_torchvision(SMALL, ours)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features = ours.eval().backbone(images)
        torch.testing.assert_close(theirs.eval().backbone(images), features)
        (our_logits,), _ = ours.rpn.head([features])
        (their_logits,), _ = theirs.rpn.head([features])
    by_class = our_logits.unflatten(1, (-1, 2))
    torch.testing.assert_close(their_logits, by_class[:, :, 1] - by_class[:, :, 0])


def test_csv_round_trip(tmp_path):
    given = [row(), row(num_boxes=100), row(num_boxes=100, busy=True, graphed_ms=None), step_row()]
    report.update(tmp_path / "results.csv", given)
    assert report.read(tmp_path / "results.csv") == given


def test_a_row_takes_the_place_of_what_measured_the_same(tmp_path):
    path = tmp_path / "results.csv"
    report.update(path, [row(num_boxes=1), row(num_boxes=2)])
    again = row(num_boxes=1, median=8.0)
    report.update(path, [again])
    assert report.read(path) == [again, row(num_boxes=2)]


def test_csv_without_the_optional_columns(tmp_path):
    path = tmp_path / "results.csv"
    required = "op,size,dtype,device,ours_p20_ms,ours_p50_ms,ours_p80_ms"
    path.write_text(
        f"{required},torchvision_p20_ms,torchvision_p50_ms,torchvision_p80_ms,ratio\nnms,small,float32,cpu,1,2,3,4,5,6,2.5\n"
    )
    (found,) = report.read(path)
    assert (found.ours_p50_ms, found.ratio, found.times_floor, found.busy) == (2.0, 2.5, None, False)


@pytest.mark.parametrize("floor_ms", [0.125, None])
def test_plot_writes_a_picture(tmp_path, floor_ms):
    report.update(tmp_path / "results.csv", [row(floor_ms=floor_ms), row(floor_ms=None, median=0.5, size="small")])
    plot.main([str(tmp_path / "results.csv"), str(tmp_path)])
    with Image.open(tmp_path / "benchmarks.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == (1820 if floor_ms else 1430)
    assert not (tmp_path / "growth.png").exists()


def test_plot_draws_cost_against_size(tmp_path):
    many = [row(num_boxes=count, median=count / 100, busy=busy) for count in (100, 1000) for busy in (False, True)]
    report.update(tmp_path / "results.csv", [*many, row()])
    plot.main([str(tmp_path / "results.csv"), str(tmp_path)])
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.format == "PNG"


def test_the_worst_row_stands_beside_the_best():
    rows = [
        *(row(device="cpu, 2 threads", size=f"size {median}", median=median) for median in (0.25, 3.0, 5.0)),
        row(device="cpu, 2 threads", size="small", median=0.125, busy=True),
        row(device="cpu, 2 threads", op="match", size="all", median=2.0),
    ]
    head, _, suppression, matching = tables.worst_and_best(rows)
    assert head == "|  | least | of | most | of |"
    assert suppression == (
        "| suppression | 0.12 | nms, first kept: small; 2 threads, busy | 5.00 | nms, first kept: size 5.0 |"
    )
    assert matching == "| matching | 2.00 | match: all | 2.00 | match: all |"


def test_documents_are_filled_between_the_marks(tmp_path):
    report.update(tmp_path / "some-device.csv", [row(num_boxes=100), row(num_boxes=300, median=2.0)])
    text = "before\n<!-- from some-device: growth -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert "| nms, first kept | 12000 -> 2000, IoU 0.7 | 100: 4.00, 300: 2.00 | 2.00 (300;" in filled
    assert "old" not in filled
    assert tables.fill(filled, tmp_path) == filled


def test_short_calls_are_repeated():
    assert timing.count_repeats(0.01) == 200
    assert timing.count_repeats(50.0) == 1
    assert timing.count_rounds(1.0, 10) == 10
    assert timing.count_rounds(1e6, 10) == 3


def test_the_busy_neighbor_ends():
    with timing.busy_neighbor() as process:
        assert os.path.exists(f"/proc/{process}")
    assert not os.path.exists(f"/proc/{process}")


def test_times_of_kernels_are_sorted_and_may_be_missing():
    events = [("small", 5.0), ("large", 40.0), ("small", 5.0)] * kernel_times.REPEATS
    whole, large, small = kernel_times.table("step", 60.0, events)
    assert whole == ("step", "the whole call", "1", "60.00", "")
    assert large == ("step", "large", "1", "40.00", "0.800")
    assert small == ("step", "small", "2", "10.00", "0.200")
    _, nothing = kernel_times.table("step", 60.0, [])
    assert nothing == ("step", "the profiler recorded nothing", "", "", "")


def test_alternatives_give_the_same():
    choice = alternatives.first_of_many(torch.device("cpu"), 2, 50, 7)
    assert [found.way for found in alternatives.measure(choice, lambda call: 1.0)] == ["topk", "sort"]
    with pytest.raises(ValueError, match="worse differs"):
        alternatives.measure(
            choice._replace(ways={**choice.ways, "worse": lambda: choice.ways["sort"]()[::-1]}), lambda call: 1.0
        )


def test_boxes_by_class_differ_and_stay_near_the_rois():
    boxes, scores = scenes.by_class(scenes.clustered, 2, 3, 40)
    assert boxes.shape == (6, 40, 4)
    assert scores.shape == (6, 40)
    assert not torch.equal(boxes[0], boxes[1])
    same_image, other_image = ((boxes[0] - boxes[other]).abs().mean() for other in (1, 3))
    assert same_image < other_image / 4
