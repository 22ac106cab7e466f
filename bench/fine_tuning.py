"""Fine-tuning on photographs, fastdet's detector and torchvision's in turn: same layers, settings, loop and seeds.

    python -m bench.fine_tuning BCCD --weights-backbone mobilenet_v2_features.pth --png docs/fine_tuning.png

MobileNetV2 with a feature pyramid, its first layers frozen, 320 x 480 pixels, batches of four, six epochs, an
evaluation after each. Prints AP and the seconds of training of each run, and the means. torchvision's detector is as
its library makes it; its epochs with weights in channels-last are timed too, one for each seed.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from fastdet.engine.evaluate import evaluate
from fastdet.engine.run.folder import Row
from fastdet.visualize import plot_comparison

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

    def __init__(self, data: VOC, most: int | None) -> None:
        self.data, self.length = data, min(most or len(data), len(data))
        self.sizes = data.sizes[: self.length]

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


class Run(NamedTuple):
    """A run's average precision after its last epoch, the seconds of its training without evaluation, and its rows."""

    average_precision: float
    seconds: float
    losses: list[Row]
    evaluations: list[Row]


def fine_tune(
    model: nn.Module, images: UnitRange, test: UnitRange, names: Sequence[str], settings: TrainSettings
) -> Run:
    """Train a detector, with an evaluation after each epoch that is not in the seconds."""
    evaluating, found = 0.0, list[Row]()

    def validate(model: nn.Module) -> Mapping[str, float]:
        nonlocal evaluating
        start = time.perf_counter()
        coco = evaluate(model.eval(), test, names).coco
        found.append({"epoch": len(found) + 1, "AP": coco.ap, "AP50": coco.ap50, "AP75": coco.ap75})
        evaluating += time.perf_counter() - start
        return found[-1]

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rows = train(model, images, folder, settings, progress=False, validate=validate)
        seconds = time.perf_counter() - start - evaluating
    return Run(found[-1]["AP"], seconds, rows, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder in the VOC layout")
    parser.add_argument("--weights-backbone", help="a file, or IMAGENET1K_V1")
    parser.add_argument("--images", type=int, help="use the first N only", metavar="N")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--png", type=Path, help="picture of the curves of all runs")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, test = (UnitRange(VOC(options.data, split), options.images) for split in ("trainval", "test"))
    names = images.data.class_names
    runs: dict[str, list[Run]] = {"fastdet": [], "torchvision": [], "torchvision, channels-last": []}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        ours, theirs = build_fastdet(len(names) + 1, options.weights_backbone), build_torchvision(len(names) + 1)
        theirs.load_state_dict(ours.state_dict())
        for our_parameter, their_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
            their_parameter.requires_grad_(our_parameter.requires_grad)
        channels_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        for (name, of_name), model in zip(runs.items(), (ours, theirs, channels_last), strict=True):
            settings = TrainSettings(epochs=1 if model is channels_last else options.epochs, seed=seed)
            of_name.append(fine_tune(model.to(device), images, test, names, settings))
            ap, seconds = of_name[-1][:2]
            print(f"seed {seed}, {name}: AP {ap:.3f}, {seconds / settings.epochs:.1f} s an epoch", flush=True)
    mean_ap = [statistics.mean(run.average_precision for run in runs[name]) for name in ("fastdet", "torchvision")]
    ours_s, theirs_s, last_s = (statistics.median(run.seconds for run in of_name) for of_name in runs.values())
    print(f"mean AP: fastdet {mean_ap[0]:.3f}, torchvision {mean_ap[1]:.3f}")
    print(f"medians of {options.epochs} epochs: fastdet {ours_s:.0f} s, torchvision {theirs_s:.0f} s", end=", ")
    print(f"ratio {theirs_s / ours_s:.2f}; with channels-last weights {last_s * options.epochs / ours_s:.2f}")
    if options.png:
        shown = {f"{name}, seed {seed}": run for name in list(runs)[:2] for seed, run in enumerate(runs[name])}
        losses = {name: run.losses for name, run in shown.items()}
        plot_comparison(losses, {name: run.evaluations for name, run in shown.items()}, options.png)


if __name__ == "__main__":
    main()
