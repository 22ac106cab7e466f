"""The whole step, beside torchvision's detector of the same backbone, anchors and numbers of proposals and samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import fastdet

CLASSES = 21


class RoIMaxPool(MultiScaleRoIAlign):
    """torchvision's place for RoI pooling, filled with its RoI max-pool over one level."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return torchvision.ops.roi_pool(x["0"], boxes, self.output_size, 1 / 16)


def theirs(name: str, min_size: int, max_size: int) -> nn.Module:
    """torchvision's FasterRCNN with the numbers of the VGG16 detector, as far as it has them."""
    backbone, head = fastdet.backbones.build(name)
    if head is None:
        head = TwoMLPHead(backbone.out_channels * 49, 1024)
    return torchvision.models.detection.FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=torchvision.models.detection.rpn.AnchorGenerator(((128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=RoIMaxPool(["0"], 7, 2),
        box_head=head,
        box_predictor=FastRCNNPredictor(head.fc7.out_features, CLASSES),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_train=2000,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=128,
        box_nms_thresh=0.3,
        box_detections_per_img=6000,
    )


def scene(batch: int, height: int, width: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator) for _ in range(batch)]
    corner = torch.rand(batch, 8, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
    side = 30 + torch.rand(batch, 8, 2, generator=generator) * torch.tensor([width * 0.3, height * 0.3])
    boxes = torch.cat([corner, corner + side], dim=2)
    return images, [{"boxes": box, "labels": torch.arange(1, 9)} for box in boxes]


# On a CPU the small backbone, which finishes; on a GPU the reference model at its own size.
CASES = [("mobilenet_v2", 320, 480, 1), ("mobilenet_v2", 320, 480, 4)]
if torch.cuda.is_available():
    CASES += [("vgg16", 600, 901, 1), ("vgg16", 600, 901, 4), ("vgg16", 600, 901, 16)]


@pytest.mark.parametrize(("name", "height", "width", "batch"), CASES)
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_step(
    versus: Callable[..., None], device: torch.device, name: str, height: int, width: int, batch: int, mode: str
) -> None:
    images, targets = scene(batch, height, width)
    images = [image.to(device) for image in images]
    there = [{key: value.to(device) for key, value in target.items()} for target in targets]
    numbers: dict[str, Any] = {"min_size": height, "max_size": max(height, width)}
    # As many hidden channels as torchvision's head has, which is as many as the features have.
    hidden = {"rpn_hidden_channels": None}

    def step(model: nn.Module, targets: list[dict[str, Tensor]]) -> Callable[[], object]:
        model.to(device).train(mode == "train")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def train() -> None:
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()

        def infer() -> object:
            with torch.inference_mode():
                return model(images)

        return train if mode == "train" else infer

    torch.manual_seed(0)
    ours = step(fastdet.FasterRCNN(name, CLASSES, **hidden, **numbers), targets)
    versus(
        ours,
        step(theirs(name, **numbers), there),
        op=f"model, {mode}",
        size=f"{name} {height} x {width}, batch {batch}",
        rounds=10 if torch.cuda.is_available() else 3,
    )
