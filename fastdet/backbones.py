"""Feature extractors by name: torchvision's networks, cut where their features have a stride of 16 pixels."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

# The networks by name, and the pixels between their cells of features.
STRIDES = {"vgg16": 16, "mobilenet_v2": 16, "small": 8}

# How many of the last blocks of layers train by default when the weights are pretrained.
TRAINABLE = {"vgg16": 3, "mobilenet_v2": 3, "small": 6}

# The layers kept, and where each block of layers begins.
_VGG16_LAYERS, _VGG16_BLOCKS = 30, (0, 5, 10, 17, 24)
_MOBILENET_V2_LAYERS, _MOBILENET_V2_BLOCKS = 14, (0, 2, 4, 7)


class Backbone(nn.Sequential):
    """Layers that turn images [B, 3, H, W] into one level of features [B, out_channels, H / stride, W / stride]."""

    def __init__(self, layers: list[nn.Module], out_channels: int, stride: int) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels
        self.strides = (stride,)


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, in one pass over the features instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def build(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    trainable_layers: int | None = None,
    freeze_batchnorm: bool | None = None,
) -> tuple[Backbone, TwoMLPHead | None]:
    """A named backbone, and for VGG16 the box head made of its own two hidden layers (fc6, fc7).

    Args:
        name: one of `STRIDES`.
        weights: the name of torchvision's ImageNet weights ("IMAGENET1K_V1", ...), or a file with a state dict of the
            classifier or of its `features` alone.
        trainable_layers: how many of the last blocks train; the blocks before are frozen. Without `weights` all train.
        freeze_batchnorm: use the stored statistics and never update them; by default so with `weights`.

    Raises:
        ValueError: an unknown name, a number of blocks out of range, a file whose keys or shapes do not fit.
    """
    if freeze_batchnorm is None:
        freeze_batchnorm = weights is not None
    norm = FrozenBatchNorm2d if freeze_batchnorm else nn.BatchNorm2d
    state = None if weights is None else _read(name, weights)
    head = None
    blocks: tuple[int, ...]
    if name == "vgg16":
        network = torchvision.models.vgg16(weights=None)
        layers = list(network.features[:_VGG16_LAYERS])
        backbone, blocks = Backbone(layers, 512, STRIDES[name]), _VGG16_BLOCKS
        # The head takes over the classifier's layers, so its own need no memory.
        with torch.device("meta"):
            head = TwoMLPHead(512 * 7 * 7, 4096)
        head.fc6, head.fc7 = network.classifier[0], network.classifier[3]
        if state is not None and "classifier.0.weight" in state:
            _load(head, _renamed(state, {"classifier.0.": "fc6.", "classifier.3.": "fc7."}))
    elif name == "mobilenet_v2":
        layers = list(torchvision.models.mobilenet_v2(weights=None, norm_layer=norm).features[:_MOBILENET_V2_LAYERS])
        backbone, blocks = Backbone(layers, 96, STRIDES[name]), _MOBILENET_V2_BLOCKS
    elif name == "small":
        backbone = _small(norm)
        blocks = tuple(range(len(backbone)))
    else:
        raise ValueError(f"backbone must be one of {', '.join(STRIDES)} or a module, got {name!r}")
    if state is not None:
        features = {
            key.removeprefix("features."): value for key, value in state.items() if not key.startswith("classifier.")
        }
        _load(backbone, {key: value for key, value in features.items() if int(key.split(".")[0]) < len(backbone)})
    if trainable_layers is None:
        trainable_layers = len(blocks) if weights is None else TRAINABLE[name]
    if not 0 <= trainable_layers <= len(blocks):
        raise ValueError(f"trainable_backbone_layers must lie in 0..{len(blocks)} for {name}, got {trainable_layers}")
    first_trainable = (*blocks, len(backbone))[len(blocks) - trainable_layers]
    for layer in list(backbone)[:first_trainable]:
        layer.requires_grad_(False)
    return backbone, head


def _small(norm: type[nn.Module]) -> Backbone:
    """Six small convolutions with a stride of 8 pixels, to be trained from scratch in minutes on a CPU."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (96, 1)):
        convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        layers.append(nn.Sequential(convolution, norm(width), nn.ReLU(inplace=True)))
        channels = width
    return Backbone(layers, channels, STRIDES["small"])


def _read(name: str, weights: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    available = {} if name == "small" else torchvision.models.get_model_weights(name).__members__
    if str(weights) in available:
        return available[str(weights)].get_state_dict(progress=True, check_hash=True)
    try:
        state: Any = torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        known = ", ".join(available) or "none"
        raise ValueError(f"weights_backbone: no file {os.fspath(weights)!r}, and not one of {known}") from None
    except Exception as error:
        raise ValueError(f"weights_backbone: {os.fspath(weights)!r} can't be read as weights: {error}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights_backbone: {os.fspath(weights)!r} does not hold a state dict of tensors")
    unknown = [key for key in state if not re.match(r"(features\.)?\d+\.|classifier\.", key)]
    if unknown:
        found = f"it holds {unknown[0]!r}"
        raise ValueError(f"weights_backbone: {os.fspath(weights)!r} is not a state dict of {name}: {found}")
    return state


def _renamed(state: Mapping[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """The entries under the old prefixes, under the new ones."""
    return {
        new + key.removeprefix(old): value
        for old, new in prefixes.items()
        for key, value in state.items()
        if key.startswith(old)
    }


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights_backbone: {error}") from None
