"""A detector small enough for loops, and images with ground truth for it."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdet import VGG16, AnchorGenerator, FasterRCNN
from tests.helpers.weights import randomize_heads

NUM_CLASSES = 4

# Settings with which every step of the large detector has something to do in the small one.
SMALL_SETTINGS: dict[str, Any] = {
    "min_size": 64,
    "max_size": 96,
    "rpn_anchor_generator": AnchorGenerator(sizes=((16, 32),), strides=(16,), offset=8.0, rounded=False),
    "rpn_hidden_channels": 8,
    "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_test": 20,
    "rpn_min_size": 4.0,
    "rpn_fg_iou_thresh": 0.5,
    "box_pool_size": 3,
    "box_representation_size": 16,
    "box_batch_size_per_image": 16,
}


class TinyBackbone(nn.Sequential):
    """Two strided convolutions: 4 channels at a stride of 16, with BatchNorm and dropout in between."""

    def __init__(self) -> None:
        first = nn.Conv2d(3, 4, 4, stride=4)
        super().__init__(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 4, 4, stride=4))
        self.out_channels = 4


def small_detector(seed: int = 0, **overrides: Any) -> FasterRCNN:
    torch.manual_seed(seed)
    model = FasterRCNN(TinyBackbone(), NUM_CLASSES, **{"settings": VGG16, **SMALL_SETTINGS, **overrides})
    randomize_heads(model)
    return model


def small_scene(seed: int = 1) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three images of two sizes; the second has no boxes, the third a box that sticks out and one that is ignored."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 80), (96, 70), (64, 80))]
    boxes = [
        torch.tensor([[4.3, 6.1, 30.7, 39.2], [35.9, 10.4, 76.2, 59.1], [20.8, 31.3, 49.6, 62.7]]),
        torch.zeros(0, 4),
        torch.tensor([[-9.0, 5.3, 21.9, 25.6], [47.2, 30.8, 90.0, 70.0], [10.4, 9.7, 30.2, 29.1]]),
    ]
    labels = [torch.tensor([1, 3, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([2, 2, 1])]
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
    targets[2]["ignore"] = torch.tensor([False, False, True])
    return images, targets


# Torchvision's hyperparameters for a detector of small images on `Pyramid`.
PYRAMID_SETTINGS: dict[str, Any] = {
    "min_size": 96,
    "max_size": 160,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": 150,
    "rpn_post_nms_top_n_test": 60,
    "box_detections_per_img": 30,
}


class Pyramid(nn.Module):
    """Three levels of features, of which two are pooled."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 8, stride=8)
        self.middle = nn.Conv2d(8, 8, 2, stride=2)
        self.coarse = nn.Conv2d(8, 8, 2, stride=2)

    def forward(self, images):
        fine = self.fine(images)
        middle = self.middle(fine.relu())
        return {"0": fine, "1": middle, "pool": self.coarse(middle.relu())}
