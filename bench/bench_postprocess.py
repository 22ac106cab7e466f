"""From the logits and deltas of the box head to detections, as the two libraries' RoI heads do it."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads

from bench import scenes
from fastdet.models.roi_heads import RoIHeads
from fastdet.models.settings import TORCHVISION
from fastdet.structures import Proposals

HEIGHT, WIDTH = 600, 1000


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("classes", [21, 91, 1203])
@pytest.mark.parametrize("count", [300, 1000])
def test_detections(compare, device, count, classes, spread):
    """With logits N(0, 1) many classes of a box, or none, are above the score threshold, with N(0, 4) two or three."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(count, classes, generator=generator) * spread).to(device)
    deltas = torch.randn(count, 4 * classes, generator=generator).to(device)
    boxes, scores = (tensor.to(device) for tensor in scenes.uniform(count))
    proposals = Proposals(boxes[None], scores[None], torch.tensor([count], device=device))
    sizes = torch.tensor([[HEIGHT, WIDTH]], device=device)
    our_heads = RoIHeads(8, classes, TORCHVISION, nn.Identity(), nn.Identity()).eval()
    settings = TORCHVISION
    their_heads = TorchvisionRoIHeads(
        *(None, None, None, 0.5, 0.5, 512, 0.25, None),
        score_thresh=settings.box_score_thresh,
        nms_thresh=settings.box_nms_thresh,
        detections_per_img=settings.box_detections_per_img,
    ).eval()

    @torch.inference_mode()
    def ours():
        return our_heads.postprocess_detections(logits[None], deltas[None], proposals, sizes)

    @torch.inference_mode()
    def theirs():
        return their_heads.postprocess_detections(logits, deltas, [boxes], [(HEIGHT, WIDTH)])

    found, expected = ours(), theirs()[1][0]
    torch.testing.assert_close(found.scores[0, : len(expected)], expected, rtol=1e-4, atol=1e-4)
    compare(
        ours,
        theirs,
        op="postprocess_detections",
        size=f"{classes} classes, logits N(0, {spread:g})",
        num_boxes=count,
        graph=True,
    )
