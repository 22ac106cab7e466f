"""The tables of the documents, from a CSV of results.

    python -m bench.tables README.md docs/benchmarks.md

writes each between the lines `<!-- from RESULTS: NAME -->` and `<!-- end -->`: the table NAME of `TABLES` from
bench/results/RESULTS.csv.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import report
from bench.report import Row

RESULTS = Path(__file__).parent / "results"
MARKER = r"<!-- from ([\w-]+): (\w+) -->"

# What belongs together in the README: a pattern of the names of operations.
FAMILIES = {
    "suppression": r"nms[, ].*|batched_nms",
    "post-processing": r"postprocess_detections",
    "matching": r"match",
    "sampling": r"sample",
    "decoding": r"decode",
    "RoI pooling": r"roi_(pool|align).*",
    "IoU of all pairs": r"(\w+_)?box_iou",
    "training step": r"model, train.*",
    "detection": r"model, infer.*",
    "one image": r"one image, .*",
    "loading images": r"loading",
    "`fastdet.accelerate`": r"accelerated, .*",
}


def usual_condition(rows: Sequence[Row]) -> str:
    """The condition that most rows were measured in, of those with nothing beside them."""
    conditions = [row.condition for row in rows if not row.busy]
    return max(conditions, key=conditions.count)


def worst_and_best(rows: Sequence[Row]) -> list[str]:
    """A line for each family: the row that is the slowest beside torchvision, in any condition, and the fastest."""
    usual = usual_condition(rows)

    def describe(row: Row) -> str:
        return f"{row.op}: {with_dtype(row)}" + ("" if row.condition == usual else f"; {_short(row.condition)}")

    lines = []
    for family, pattern in FAMILIES.items():
        members = sorted((row for row in rows if re.fullmatch(pattern, row.op)), key=lambda row: row.ratio)
        if members:
            worst, best = members[0], members[-1]
            cells = family, f"{worst.ratio:.2f}", describe(worst), f"{best.ratio:.2f}", describe(best)
            lines.append(_line(cells))
    return [*_head("", "least", "of", "most", "of"), *lines]


def operations(rows: Sequence[Row]) -> list[str]:
    """How many times as fast each operation and step is in fp32, with a column for each condition."""
    conditions = list(dict.fromkeys(row.condition for row in rows))
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.num_boxes is None and "16" not in row.dtype and not row.op.startswith("one image"):
            ratios.setdefault((row.op, row.size), {})[row.condition] = row.ratio
    return [
        *_head("operation", "size", *map(_short, conditions)),
        *(_line((*what, *(_ratio(by.get(condition)) for condition in conditions))) for what, by in ratios.items()),
    ]


def growth(rows: Sequence[Row]) -> list[str]:
    """How many times as fast the calls are that were measured with several numbers of boxes."""
    usual = usual_condition(rows)
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.num_boxes is not None:
            series.setdefault((row.op, row.size), []).append(row)
    lines = []
    for what, members in series.items():
        shown = ", ".join(f"{row.num_boxes}: {row.ratio:.2f}" for row in members if row.condition == usual)
        worst = min(members, key=lambda row: row.ratio)
        lines.append(_line((*what, shown, f"{worst.ratio:.2f} ({worst.num_boxes}; {_short(worst.condition)})")))
    return [*_head("operation", "size", f"boxes: times as fast, {_short(usual)}", "least of all"), *lines]


def whole_steps(rows: Sequence[Row]) -> list[str]:
    """What a step of four images costs in every way to run it, in brackets torchvision's in eager mode."""
    lines = []
    for row in rows:
        if row.peak_mib is not None and row.size.endswith("batch 4") and row.condition == usual_condition(rows):
            pairs = [
                (row.peak_mib, row.torchvision_peak_mib),
                (row.launches, row.torchvision_launches),
                (row.host_syncs, row.torchvision_host_syncs),
            ]
            costs = [f"{_count(ours)} ({_count(theirs)})" for ours, theirs in pairs]
            lines.append(_line((row.op, row.dtype, f"{row.images_per_s:.1f}", f"{row.ratio:.2f}", *costs)))
    return [
        *_head("step of 4 images", "dtype", "images/s", "times as fast", "peak, MiB", "operators", "host syncs"),
        *lines,
    ]


def one_image(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of detection in one image, in the ways that there are on a CPU."""
    lines = [
        _line((row.size, way, f"{row.ours_p50_ms:.1f}", f"{row.torchvision_p50_ms:.1f}"))
        for row in rows
        for way in (row.op.removeprefix("one image, "),)
        if way != row.op
    ]
    return [*_head("detector", "way", "fastdet, ms", "torchvision, ms"), *lines]


def gpu_steps(rows: Sequence[Row]) -> list[str]:
    """The steps of the detector in every way to run them on a GPU, in brackets torchvision's in eager mode."""
    lines = []
    for row in rows:
        if row.images_per_s is not None and row.op.startswith("model"):
            pairs = [(row.launches, row.torchvision_launches), (row.host_syncs, row.torchvision_host_syncs)]
            costs = [f"{_count(ours)} ({_count(theirs)})" for ours, theirs in pairs]
            times = f"{row.ours_p50_ms:.2f} ({row.torchvision_p50_ms:.2f})"
            lines.append(_line((row.op, row.size, row.dtype, times, f"{row.ratio:.2f}", *costs)))
    return [*_head("step", "size", "dtype", "ms", "times as fast", "launches", "host syncs"), *lines]


def gpu_operations(rows: Sequence[Row]) -> list[str]:
    """Each operation on a GPU: in microseconds alone, in a CUDA graph, and the least that its memory or units allow."""
    lines = []
    for row in rows:
        if row.images_per_s is None:
            graphed, floor = (_microseconds(value) for value in (row.graphed_ms, row.floor_ms))
            alone = f"{_microseconds(row.ours_p50_ms)} ({_microseconds(row.torchvision_p50_ms)})"
            lines.append(_line((row.op, with_dtype(row), alone, f"{row.ratio:.2f}", graphed, floor)))
    head = "operation", "size", "us (torchvision's)", "times as fast", "us in a graph", "floor, us"
    return [*_head(*head), *lines]


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "worst_and_best": worst_and_best,
    "operations": operations,
    "growth": growth,
    "whole_steps": whole_steps,
    "one_image": one_image,
    "gpu_steps": gpu_steps,
    "gpu_operations": gpu_operations,
}


def fill(text: str, results: Path = RESULTS) -> str:
    """A document with its tables as the results are, which lie in a folder."""

    def table(found: re.Match[str]) -> str:
        rows = report.read(results / f"{found[2]}.csv")
        return "\n".join([found[1], *TABLES[found[3]](rows), "", found[4]])

    return re.sub(rf"({MARKER}\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def with_dtype(row: Row) -> str:
    """The size and the dtype; fp32 and the integers of the sampler are left out."""
    return row.described + (f", {row.dtype}" if "16" in row.dtype else "")


def _short(condition: str) -> str:
    return condition.removeprefix("cpu, ")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _microseconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds * 1e3:.1f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _head(*cells: str) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the tables of documents from the results.")
    parser.add_argument("documents", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    for path in options.documents:
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
