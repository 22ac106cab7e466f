import pytest
import torch
import torchvision

from bench import roofline, scenes
from fastdet import ops

KINDS = {
    "box_iou": (ops.box_iou, torchvision.ops.box_iou),
    "generalized_box_iou": (ops.generalized_box_iou, torchvision.ops.generalized_box_iou),
    "distance_box_iou": (ops.distance_box_iou, torchvision.ops.distance_box_iou),
    "complete_box_iou": (ops.complete_box_iou, torchvision.ops.complete_box_iou),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [12000] if torch.cuda.is_available() else [10, 100, 2000])
def test_pairs(compare, device, kind, count):
    first, second = (scenes.uniform(count, seed)[0].to(device) for seed in (0, 1))
    ours, theirs = KINDS[kind]
    torch.testing.assert_close(ours(first, second), theirs(first, second), rtol=1e-4, atol=1e-5)
    compare(
        lambda: ours(first, second),
        lambda: theirs(first, second),
        op=kind,
        size=f"{count} x {count}",
        floor=roofline.box_iou(count, count),
        graph=True,
    )
