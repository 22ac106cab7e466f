"""Feature extractors by name: torchvision's networks, cut at a stride of 16 pixels or with a feature pyramid on top."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastdet.interop.torchvision_objects import Weights, read_weights
from fastdet.models.anchors import AnchorGenerator
from fastdet.models.layers import FrozenBatchNorm2d, join_relu
from fastdet.models.settings import TORCHVISION, VGG16, Settings
from fastdet.weights.convert import WeightsError, load


@dataclass(frozen=True)
class NamedBackbone:
    """The properties of a backbone that are fixed by its name.

    Attributes:
        strides: pixels between the cells of each level.
        trainable: how many of its last blocks of layers train by default when its weights are pretrained.
        settings: the default ones of a detector with this backbone.
        network: the name of torchvision's classifier that it is part of, None if there is none.
        batchnorm_trains: BatchNorm trains when the weights are pretrained too.
    """

    strides: tuple[int, ...]
    trainable: int
    settings: Settings
    network: str | None
    batchnorm_trains: bool = False

    def trainable_layers(self, given: int | None, pretrained: bool) -> int | None:
        """How many of the last blocks train, None being all; `given` None takes the default."""
        return self.trainable if given is None and pretrained else given

    def freezes_batchnorm(self, pretrained: bool) -> bool:
        return pretrained and not self.batchnorm_trains


def _pyramid(pooled: int, sizes: tuple[tuple[float, ...], ...], **changes: Any) -> Settings:
    """torchvision's settings with anchors of these `sizes`, RoIs pooled from the first `pooled` levels."""
    names = tuple(str(level) for level in range(pooled))
    return TORCHVISION.override(rpn_anchor_generator=AnchorGenerator(sizes), box_featmap_names=names, **changes)


_RESNET_STRIDES = (4, 8, 16, 32, 64)
_FEW = {f"rpn_{n}_top_n_{of}": most for n, most in (("pre_nms", 500), ("post_nms", 300)) for of in ("train", "test")}

NAMED = {
    "vgg16": NamedBackbone((16,), 3, VGG16, "vgg16"),
    "mobilenet_v2": NamedBackbone((16,), 3, VGG16, "mobilenet_v2"),
    "small": NamedBackbone((8,), 6, VGG16, None),
    **{f"resnet{n}_fpn": NamedBackbone(_RESNET_STRIDES, 3, TORCHVISION, f"resnet{n}") for n in (18, 34, 50, 101)},
    # Li et al. 2021 (arXiv:2111.11429), section 3, as torchvision builds it.
    "resnet50_fpn_v2": NamedBackbone(
        _RESNET_STRIDES, 3, TORCHVISION.override(rpn_conv_depth=2, box_num_convs=4), "resnet50", batchnorm_trains=True
    ),
    "mobilenet_v2_fpn": NamedBackbone(
        (8, 16, 32, 64),
        3,
        # Light steps for a light network.
        _pyramid(3, ((32,), (64,), (128,), (256,)), box_representation_size=256, box_batch_size_per_image=128, **_FEW),
        "mobilenet_v2",
    ),
    "mobilenet_v3_large_fpn": NamedBackbone(
        (32, 32, 64),
        3,
        _pyramid(2, ((32, 64, 128, 256, 512),) * 3, rpn_score_thresh=0.05),
        "mobilenet_v3_large",
    ),
}

# How many layers are used, and the index of the first layer of each block.
_VGG16_LAYERS, _VGG16_BLOCKS = 30, (0, 5, 10, 17, 24)
_MOBILENET_V2_LAYERS, _MOBILENET_V2_BLOCKS = 14, (0, 2, 4, 7)
_MOBILENET_V2_FPN_LAYERS, _MOBILENET_V2_FPN_BLOCKS = 18, (0, 2, 4, 7, 14)
_MOBILENET_V3_BLOCKS = (0, 2, 4, 7, 13, 16)
_RESNET_BLOCKS = ("conv1", "layer1", "layer2", "layer3", "layer4")
_CLASSIFIER = re.compile(r"classifier\.|fc\.")
_FPN_CHANNELS, _LIGHT_FPN_CHANNELS = 256, 128


class Backbone(nn.Sequential):
    """Layers that turn images [B, C, H, W] into one level of features [B, out_channels, H / stride, W / stride]."""

    def __init__(self, layers: list[nn.Module], out_channels: int, stride: int) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels
        self.strides = (stride,)


def least_side(backbone: nn.Module) -> int:
    """Pixels a side that a chain of layers needs for one cell of its features; 1 for other modules.

    Dumoulin and Visin 2016 (arXiv:1603.07285), relationship 6, solved for the input.
    """
    least = 1, 1
    layers = list(backbone.modules())
    is_chain = all(isinstance(layer, nn.Sequential) for layer in layers if any(True for _ in layer.children()))
    for layer in reversed(layers if is_chain else []):
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) and not isinstance(layer.padding, str):
            given = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            least = tuple(
                max((cells - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding, 1)
                for cells, kernel, stride, padding, dilation in zip(
                    least, *(np.broadcast_to(value, 2).tolist() for value in given), strict=True
                )
            )
    return max(least)


def default_settings(backbone: str | nn.Module) -> Settings:
    """Those of a named backbone; torchvision's for a module."""
    named = NAMED.get(backbone) if isinstance(backbone, str) else None
    return TORCHVISION if named is None else named.settings


def build(
    name: str,
    weights: Weights | None = None,
    trainable_layers: int | None = None,
    freeze_batchnorm: bool | None = None,
    in_channels: int = 3,
    progress: bool = True,
) -> tuple[nn.Module, TwoMLPHead | None]:
    """A named backbone, and for VGG16 the box head made of its own two hidden layers (fc6, fc7).

    Args:
        name: one of `NAMED`.
        weights: torchvision's ImageNet weights (its enum, or a name such as "IMAGENET1K_V1"), or a file with a state
            dict of the classifier or of its features alone.
        trainable_layers: how many of the last blocks train; the blocks before are frozen. Without `weights` all train.
        freeze_batchnorm: use the stored statistics and never update them; by default so with `weights`, but for
            "resnet50_fpn_v2".
        in_channels: of the images. The first convolution's pretrained weights are repeated over the channels (channel
            c has those of c mod 3) and scaled by 3 / in_channels, which keeps the scale of its output.
        progress: show the download of named weights.

    Raises:
        ValueError: an unknown name, a number of blocks out of range, a file whose keys or shapes do not fit.
    """
    if name not in NAMED:
        raise ValueError(f"backbone must be one of {', '.join(NAMED)} or a module, got {name!r}")
    if freeze_batchnorm is None:
        freeze_batchnorm = NAMED[name].freezes_batchnorm(pretrained=weights is not None)
    norm = FrozenBatchNorm2d if freeze_batchnorm else nn.BatchNorm2d
    state = None if weights is None else _read(name, weights, progress)
    head = None
    if name == "vgg16":
        network, head = _vgg16(state)
        layers: Any = network.features[:_VGG16_LAYERS]
        backbone: nn.Module = Backbone(list(layers), 512, 16)
        blocks = _split_blocks(layers, _VGG16_BLOCKS)
    elif name == "small":
        layers = backbone = _small(norm)
        blocks = _split_blocks(layers, range(len(layers)))
    elif name.startswith("resnet"):
        layers = _classifier(name, norm)
        del layers.fc
        backbone, blocks = _resnet_fpn(layers, nn.BatchNorm2d if name.endswith("_v2") else None)
    else:
        layers = _classifier(name, norm).features
        backbone, layers, blocks = _mobilenet(name, layers)
    if state is not None:
        _load(layers, _select_features(layers, state, f"{str(weights)!r} is not a state dict of {name}"))
    if in_channels != 3:
        _widen_first_convolution(layers, in_channels, pretrained=state is not None)
    _freeze(name, blocks, trainable_layers, pretrained=weights is not None)
    return backbone, head


def move_stride_to_first_convolution(backbone: nn.Module) -> None:
    """Turn the bottlenecks of a ResNet into those of He et al. 2015, with the stride in the first, 1x1 convolution.

    The weights of that release, which detectron2's models start from, need these.
    """
    for block in backbone.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _classifier(name: str, norm: type[nn.Module]) -> Any:
    return torchvision.models.get_model(NAMED[name].network, weights=None, norm_layer=norm)


def _vgg16(state: Mapping[str, Tensor] | None) -> tuple[Any, TwoMLPHead]:
    network = torchvision.models.vgg16(weights=None)
    join_relu(network.features)
    # The head gets the classifier's layers, so its own need no memory.
    with torch.device("meta"):
        head = TwoMLPHead(512 * 7 * 7, 4096)
    head.fc6, head.fc7 = network.classifier[0], network.classifier[3]
    if state is not None and "classifier.0.weight" in state:
        _load(head, _renamed(state, {"classifier.0.": "fc6.", "classifier.3.": "fc7."}))
    return network, head


def _small(norm: type[nn.Module]) -> Backbone:
    """Six small convolutions with a stride of 8 pixels, to be trained from scratch in minutes on a CPU."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (96, 1)):
        convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        layers.append(nn.Sequential(convolution, norm(width), nn.ReLU(inplace=True)))
        channels = width
    return Backbone(layers, channels, NAMED["small"].strides[0])


def _resnet_fpn(network: Any, norm: Callable[..., nn.Module] | None) -> tuple[BackboneWithFPN, list[list[nn.Module]]]:
    """Lin et al. 2017 (arXiv:1612.03144) over the four stages of a ResNet; `norm` is that of the pyramid."""
    blocks = [[getattr(network, block)] for block in _RESNET_BLOCKS]
    blocks[0].append(network.bn1)
    levels = {f"layer{k + 1}": str(k) for k in range(4)}
    channels = [network.inplanes // 8 * 2**k for k in range(4)]
    return BackboneWithFPN(network, levels, channels, _FPN_CHANNELS, LastLevelMaxPool(), norm), blocks


def _mobilenet(name: str, features: nn.Sequential) -> tuple[nn.Module, nn.Sequential, list[list[nn.Module]]]:
    """The backbone, the layers of `features` that it is made of, and these in blocks."""
    if name == "mobilenet_v2":
        layers = features[:_MOBILENET_V2_LAYERS]
        return Backbone(list(layers), 96, NAMED[name].strides[0]), layers, _split_blocks(layers, _MOBILENET_V2_BLOCKS)
    if name == "mobilenet_v2_fpn":
        layers, firsts = features[:_MOBILENET_V2_FPN_LAYERS], list(_MOBILENET_V2_FPN_BLOCKS)
        levels, channels, width = {"6": "0", "13": "1", "17": "2"}, [32, 96, 320], _LIGHT_FPN_CHANNELS
    else:
        layers, firsts = features, list(_MOBILENET_V3_BLOCKS)
        levels, channels, width = {"13": "0", "16": "1"}, [160, 960], _FPN_CHANNELS
    return BackboneWithFPN(layers, levels, channels, width, LastLevelMaxPool()), layers, _split_blocks(layers, firsts)


def _split_blocks(layers: nn.Sequential, firsts: Sequence[int]) -> list[list[nn.Module]]:
    """The layers of a Sequential in blocks that begin at `firsts`."""
    return [list(layers)[first:end] for first, end in zip(firsts, (*firsts[1:], len(layers)), strict=True)]


def _freeze(name: str, blocks: list[list[nn.Module]], trainable_layers: int | None, pretrained: bool) -> None:
    trainable_layers = NAMED[name].trainable_layers(trainable_layers, pretrained)
    if trainable_layers is None:
        trainable_layers = len(blocks)
    if not 0 <= trainable_layers <= len(blocks):
        raise ValueError(f"trainable_backbone_layers must lie in 0..{len(blocks)} for {name}, got {trainable_layers}")
    for block in blocks[: len(blocks) - trainable_layers]:
        for layer in block:
            layer.requires_grad_(False)


def _select_features(layers: nn.Module, state: Mapping[str, Tensor], error: str) -> dict[str, Tensor]:
    """The entries for `layers` in the state dict of a classifier, or of its features alone."""
    features = {key.removeprefix("features."): value for key, value in state.items() if not _CLASSIFIER.match(key)}
    if not isinstance(layers, nn.Sequential):
        return features
    for key in features:
        if not re.match(r"\d+\.", key):
            raise ValueError(f"weights_backbone: {error}: it holds {key!r}")
    return {key: value for key, value in features.items() if int(key.split(".")[0]) < len(layers)}


def _widen_first_convolution(layers: nn.Module, in_channels: int, pretrained: bool) -> None:
    """Give the first convolution `in_channels`, its pretrained weights repeated over them."""
    first = next(layer for layer in layers.modules() if isinstance(layer, nn.Conv2d))
    weight = first.weight.detach()[:, torch.arange(in_channels) % 3] * (3 / in_channels)
    if not pretrained:
        # As torchvision initializes its networks; repeated random weights would give channels that never differ.
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    first.in_channels, first.weight = in_channels, nn.Parameter(weight)


def _read(name: str, weights: Weights, progress: bool) -> Mapping[str, Tensor]:
    network = NAMED[name].network
    enum = None if network is None else torchvision.models.get_model_weights(network)
    return read_weights("weights_backbone", enum, weights, progress)[1]


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
        load(module, state)
    except WeightsError as error:
        raise ValueError(f"weights_backbone: {error}") from None
