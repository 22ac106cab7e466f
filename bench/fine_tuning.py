"""Epochs of fine-tuning on photographs, fastdet's detector and torchvision's in turn: same layers, settings and loop.

    python -m bench.fine_tuning BCCD --weights-backbone mobilenet_v2_features.pth

MobileNetV2 with a feature pyramid, its first layers frozen, 320 x 480 pixels, batches of four. Prints the seconds of
each epoch, and at the end the medians and their ratio.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import fastdet
from fastdet.data import VOC, Item
from fastdet.engine import TrainSettings, train

SIZES = ((24,), (48,), (96,), (192,))
SETTINGS: dict[str, Any] = {
    "min_size": 320,
    "max_size": 480,
    "rpn_pre_nms_top_n_train": 500,
    "rpn_post_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 500,
    "rpn_post_nms_top_n_test": 300,
    "box_batch_size_per_image": 128,
    "box_detections_per_img": 60,
}


class UnitRange(Dataset[Item]):
    """The first items of a data set with images in 0..1, as torchvision's detectors take them."""

    def __init__(self, data: Dataset[Item], length: int) -> None:
        self.data, self.length = data, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        image, target = self.data[index]
        return image / 255, target


def build_fastdet(num_classes: int, weights: str | None) -> nn.Module:
    return fastdet.FasterRCNN(
        "mobilenet_v2_fpn",
        num_classes,
        weights_backbone=weights,
        trainable_backbone_layers=3,
        freeze_batchnorm=True,
        rpn_anchor_generator=fastdet.AnchorGenerator(SIZES),
        **SETTINGS,
    )


def build_torchvision(num_classes: int) -> nn.Module:
    body = torchvision.models.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[:18]
    levels = {"6": "0", "13": "1", "17": "2"}
    return TheirFasterRCNN(
        BackboneWithFPN(body, levels, [32, 96, 320], 128, extra_blocks=LastLevelMaxPool()),
        None,
        rpn_anchor_generator=TheirAnchorGenerator(SIZES, ((0.5, 1.0, 2.0),) * len(SIZES)),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=TwoMLPHead(128 * 49, 256),
        box_predictor=FastRCNNPredictor(256, num_classes),
        **SETTINGS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder in the VOC layout")
    parser.add_argument("--weights-backbone", help="a file, or IMAGENET1K_V1")
    parser.add_argument("--images", type=int, help="use the first N only", metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    data = VOC(options.data, "trainval")
    images = UnitRange(data, min(options.images or len(data), len(data)))
    ours = build_fastdet(len(data.class_names) + 1, options.weights_backbone)
    theirs = build_torchvision(len(data.class_names) + 1)
    theirs.load_state_dict(ours.state_dict())
    for our_parameter, their_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        their_parameter.requires_grad_(our_parameter.requires_grad)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, list[float]] = {"fastdet": [], "torchvision": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, model in (("fastdet", ours), ("torchvision", theirs)):
                start = time.perf_counter()
                settings = TrainSettings(epochs=1, lr=0.002, warmup_steps=0)
                train(model.to(device), images, Path(folder) / name, settings, overwrite=True, progress=False)
                seconds[name].append(time.perf_counter() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s an epoch of {len(images)} images", flush=True)
    ours_s, theirs_s = (statistics.median(times) for times in seconds.values())
    print(f"medians: fastdet {ours_s:.1f} s, torchvision {theirs_s:.1f} s, ratio {theirs_s / ours_s:.2f}")


if __name__ == "__main__":
    main()
