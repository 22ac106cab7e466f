import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from bench import roofline
from fastdet import ops

HEIGHT, WIDTH = 600, 901
GRID = (37, 56)
CLAMP = math.log(1000 / 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 16] if torch.cuda.is_available() else [1])
def test_proposals(compare, device, batch, dtype):
    """From what the head's convolutions gave to clipped boxes and scores."""
    generator = torch.Generator().manual_seed(0)
    deltas = (torch.randn(batch, 36, *GRID, generator=generator) * 0.3).to(device, getattr(torch, dtype))
    logits = torch.randn(batch, 9, *GRID, generator=generator).to(device, getattr(torch, dtype))
    images = ImageList(torch.empty(batch, 3, HEIGHT, WIDTH, device=device), [(HEIGHT, WIDTH)] * batch)
    sizes = torch.tensor(images.image_sizes, device=device)
    anchor_generator = AnchorGenerator(((128, 256, 512),), ((0.5, 1.0, 2.0),)).to(device)
    cell_anchors = anchor_generator.cell_anchors[0].to(device)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0), CLAMP)

    def ours():
        return ops.decode(deltas, logits, cell_anchors, sizes, stride=(16, 16), min_side=1e-3, clamp=CLAMP)

    def theirs():
        anchors = anchor_generator(images, [deltas.float()])
        by_anchor = deltas.view(batch, 9, 4, *GRID).permute(0, 3, 4, 1, 2).reshape(-1, 4).float()
        decoded = coder.decode(by_anchor, anchors).view(batch, -1, 4)
        scores = logits.permute(0, 2, 3, 1).reshape(batch, -1).float()
        return [clip_boxes_to_image(*pair) for pair in zip(decoded, images.image_sizes, strict=True)], scores

    torch.testing.assert_close(ours().boxes, torch.stack(theirs()[0]), rtol=1e-5, atol=1e-2)
    num_anchors = GRID[0] * GRID[1] * 9
    compare(
        ours,
        theirs,
        op="decode",
        size=f"{batch} x {num_anchors} anchors",
        dtype=dtype,
        rounds=20,
        floor=roofline.decode(batch * num_anchors, 1, deltas.element_size()),
        graph=True,
    )
