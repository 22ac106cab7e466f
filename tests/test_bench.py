"""The arithmetic of the benchmarks: floors, percentiles, the table, the picture. What they measure is not tested."""

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

# The benchmarks import one another as scripts do, from their own folder.
sys.path.append(str(Path(__file__).parents[1] / "bench"))

import floors
import plot
import scenes
import table

H100 = floors.DEVICES["NVIDIA H100 80GB HBM3"]
ANCHORS = 18648
POOL = floors.roi_pool(512 * 37 * 56, 128 * 512 * 49, 4)


@pytest.mark.parametrize(
    ("work", "microseconds"),
    [
        (floors.decode(16 * ANCHORS, 1, 2), 3.0),
        (floors.box_iou(12000, 12000), 192),
        (floors.nms(1, 12000), 42),
        (POOL, 7.8),
        (POOL * 2, 15.7),
        # Launches alone: one node, and two.
        (floors.decode(ANCHORS, 1, 2), 1.5),
        (floors.match(18648, 50), 3.0),
    ],
)
def test_floor_on_an_h100(work, microseconds):
    assert floors.floor_us(H100, work) == pytest.approx(microseconds, rel=0.03)


def test_no_floor_where_a_rate_is_unknown():
    cpu = floors.this_cpu(1 << 16)
    assert floors.floor_us(cpu, floors.nms(1, 100)) is None
    assert floors.floor_us(cpu, floors.box_iou(100, 100)) > 0


def test_spread():
    assert table.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert table.spread([2.0]) == (2.0, 2.0, 2.0)


def row(graphed_ms: float | None = 0.25, floor_ms: float | None = 0.125, median: float = 4.0) -> table.Row:
    return table.compared(
        op="nms",
        size="12000 -> 2000, IoU 0.7",
        dtype="float32",
        device="a device, with a comma",
        ours=table.Spread(0.5, 1.0, 1.5),
        theirs=table.Spread(median / 2, median, median * 2),
        graphed_ms=graphed_ms,
        floor_ms=floor_ms,
    )


def test_row_derives_ratio_and_times_the_floor():
    assert row().ratio == 4.0
    assert row().times_floor == 2.0
    assert row(graphed_ms=None).times_floor == 8.0
    assert row(floor_ms=None).times_floor is None


def test_csv_round_trip(tmp_path):
    given = [row(), row(graphed_ms=None, floor_ms=None)]
    table.write(tmp_path / "results.csv", given)
    drawn = [(each.op, each.size, each.dtype, each.device, each.ratio, each.times_floor) for each in given]
    assert plot.read(tmp_path / "results.csv") == drawn


def test_csv_without_the_optional_columns(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("op,size,dtype,device,ours_ms,torchvision_ms,ratio\nnms,small,float32,cpu,1.5,3,2\n")
    assert plot.read(path) == [("nms", "small", "float32", "cpu", 2.0, None)]


@pytest.mark.parametrize("floor_ms", [0.125, None])
def test_plot_writes_a_picture(tmp_path, floor_ms):
    table.write(tmp_path / "results.csv", [row(floor_ms=floor_ms), row(floor_ms=None, median=0.5)])
    plot.main([str(tmp_path / "results.csv"), str(tmp_path / "results.png")])
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == (1820 if floor_ms else 1430)


def test_the_readme_says_what_was_measured():
    root = Path(__file__).parents[1]
    measured = {(row.op, row.size, f"{row.ratio:.2f}") for row in plot.read(root / "bench/results/epyc-2-cores.csv")}
    text = (root / "README.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \| (\d+\.\d\d) \|$", text, re.MULTILINE)
    assert len(rows) > 20
    assert [row for row in rows if row not in measured] == []
    (match,) = (ratio for op, size, ratio in measured if op == "match" and "50 boxes" in size)
    assert f"in the run of the table {match} times" in text


def test_boxes_by_class_differ_and_stay_near_the_rois():
    boxes, scores = scenes.by_class(scenes.clustered, 2, 3, 40)
    assert boxes.shape == (6, 40, 4)
    assert scores.shape == (6, 40)
    assert not torch.equal(boxes[0], boxes[1])
    near, far = ((boxes[0] - boxes[other]).abs().mean() for other in (1, 3))
    assert near < far / 4
