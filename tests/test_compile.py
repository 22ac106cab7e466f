"""Every kernel compiles for every target as it is launched, without spills: no GPU needed, and no interpreter."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launches import TARGETS, launches_of
from support import random_boxes

from fastdet.ops.box_iou import box_iou_cuda
from fastdet.ops.decode import decode_cuda
from fastdet.ops.match import match_cuda
from fastdet.ops.nms import nms_cuda
from fastdet.ops.roi_align import roi_align_backward_cuda, roi_align_cuda
from fastdet.ops.roi_pool import roi_pool_backward_cuda, roi_pool_cuda
from fastdet.ops.sample import sample_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so is not interpreted")

SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def roi_pool_both_ways(batch: int, channels: int, height: int, width: int, num_rois: int, dtype: torch.dtype) -> None:
    rois = torch.zeros(num_rois, 5)
    pooled, argmax = roi_pool_cuda(torch.zeros(batch, channels, height, width, dtype=dtype), rois, 1 / 16, 7, 7)
    roi_pool_backward_cuda(pooled, rois, argmax, 1 / 16, 7, 7, batch, channels, height, width)


def roi_align_both_ways(num_levels: int, channels: int, dtype: torch.dtype, sampling_ratio: int, aligned: bool) -> None:
    sides = [(200 >> level, 304 >> level) for level in range(num_levels)]
    levels = [torch.zeros(1, channels, *side, dtype=dtype) for side in sides]
    scales = [2.0 ** -(level + 2) for level in range(num_levels)]
    rules = (sampling_ratio, aligned, 224.0, 4)
    rois, sizes = torch.zeros(50, 5), [1, channels, *(length for side in sides for length in side)]
    pooled = roi_align_cuda(rois, levels, scales, 7, 7, *rules)
    roi_align_backward_cuda(pooled, rois, sizes, scales, *rules)


def match_anchors(batch: int, num_candidates: int, num_gt: int, masked: bool, allow_low_quality: bool) -> None:
    valid = torch.ones(batch, num_candidates, dtype=torch.bool) if masked else None
    gt_valid = torch.ones(batch, num_gt, dtype=torch.bool)
    candidates, gt_boxes = random_boxes(num_candidates), random_boxes(batch, num_gt)
    gt_ignore = None if valid is None else gt_valid
    match_cuda(candidates, gt_boxes, gt_valid, valid, gt_ignore, 0.7, 0.3, allow_low_quality, 0.5, [1.0] * 4)


def decode_head(batch: int, num_logits: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    deltas, logits = (
        torch.zeros(batch, 36, 37, 56, dtype=dtype),
        torch.zeros(batch, 9 * num_logits, 37, 56, dtype=dtype),
    )
    deltas, logits = (x.contiguous(memory_format=layout) for x in (deltas, logits))
    sizes = torch.zeros(batch, 2, dtype=torch.int64)
    decode_cuda(deltas, logits, torch.zeros(9, 4), sizes, torch.zeros(batch), 16, 16, 4.0)


def sample_candidates(batch: int, num_candidates: int, num_samples: int, max_positive: int) -> None:
    label = torch.zeros(batch, num_candidates, dtype=torch.int64)
    sample_cuda(label, torch.tensor([1]), num_samples, max_positive)


# Each entry calls a launcher as the operation does; the tensors lie on the CPU and nothing runs.
CALLS: dict[str, Callable[[], object]] = {
    "box_iou": lambda: box_iou_cuda(random_boxes(2, 64), random_boxes(2, 256), "iou", 1e-7),
    "nms": lambda: nms_cuda(random_boxes(1, 2048), torch.ones(1, 2048, dtype=torch.bool), 0.7, 512),
    "nms of classes": lambda: nms_cuda(random_boxes(20, 300), torch.ones(20, 300, dtype=torch.bool), 0.3, 300),
    "match of anchors": lambda: match_anchors(2, 1000, 50, True, True),
    "match of proposals": lambda: match_anchors(1, 2000, 5, False, False),
    "decode": lambda: decode_head(1, 2, torch.float32, torch.contiguous_format),
    "decode in bf16": lambda: decode_head(2, 1, torch.bfloat16, torch.channels_last),
    "sample of proposals": lambda: sample_candidates(2, 2000, 128, 32),
    "sample of anchors, thinned": lambda: sample_candidates(1, 18648, 256, 128),
    "sample of pyramids, thinned": lambda: sample_candidates(1, 268_569, 256, 128),
    "sample of many": lambda: sample_candidates(1, 30_000, 20_000, 10_000),
    "complete_box_iou": lambda: box_iou_cuda(random_boxes(2, 64), random_boxes(2, 256), "complete", 1e-7),
    "roi_align": lambda: roi_align_both_ways(4, 256, torch.float32, 2, False),
    "roi_align in bf16": lambda: roi_align_both_ways(5, 256, torch.bfloat16, 2, False),
    "roi_align, adaptive": lambda: roi_align_both_ways(1, 512, torch.float32, -1, True),
    "roi_align of ones": lambda: roi_align_both_ways(1, 1, torch.float16, 1, False),
    "roi_pool": lambda: roi_pool_both_ways(1, 512, 37, 56, 128, torch.float32),
    "roi_pool in bf16": lambda: roi_pool_both_ways(2, 256, 30, 30, 50, torch.bfloat16),
    "roi_pool of ones": lambda: roi_pool_both_ways(1, 1, 1, 1, 1, torch.float16),
}


def spilled_bytes(cubin: bytes, folder: Path) -> int:
    """Local memory of a compiled kernel, as the disassembler that ships with Triton counts it."""
    import triton.backends.nvidia as nvidia

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"LOCAL:(\d+)", usage)) + sum(
        int(found) for found in re.findall(r"STACK:(\d+)", usage)
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_compile_without_spills(monkeypatch, tmp_path, name, target):
    launches = launches_of(monkeypatch, CALLS[name])
    assert launches, "the launcher launched nothing"
    seen = set()
    for launch in launches:
        source = launch.source()
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[target]
        if "cubin" in compiled.asm:
            assert spilled_bytes(compiled.asm["cubin"], tmp_path) == 0, f"{launch.kernel.fn.__name__} spills"


def test_kernels_are_never_fused(monkeypatch):
    """A fused multiply-add in an area or a union would move decisions that sit on a threshold."""
    for name, call in CALLS.items():
        for launch in launches_of(monkeypatch, call):
            assert launch.options().get("enable_fp_fusion") is False, f"{name}: {launch.kernel.fn.__name__}"
