"""What other libraries call the layers of a detector, and how the rows of their last layers differ: plain tables, and
the renaming of former names."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The number of training steps, which BatchNorm counts and frozen BatchNorm does not.
TRACKED = "num_batches_tracked"
PREDICTOR = "roi_heads.box_predictor."

# Layers with their rows for each anchor (logits, deltas) and each class (scores, deltas), in fastdet's names.
ROWS = ("rpn.head.cls_logits", "rpn.head.bbox_pred", f"{PREDICTOR}cls_score", f"{PREDICTOR}bbox_pred")

# The names in torchvision's detectors before version 0.13, and the present ones.
FORMER_NAMES = {
    r"(rpn\.head\.conv)\.(weight|bias)$": r"\1.0.0.\2",
    r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$": r"\1.0.\2",
}

# Theirs to ours; all have a weight and a bias.
_SIMPLE_LAYERS = {
    **{f"extractor.{i}": f"backbone.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)},
    "rpn.conv1": "rpn.head.conv.0.0",
    "rpn.score": "rpn.head.cls_logits",
    "rpn.loc": "rpn.head.bbox_pred",
    "head.classifier.0": "roi_heads.box_head.fc6",
    "head.classifier.2": "roi_heads.box_head.fc7",
    "head.score": "roi_heads.box_predictor.cls_score",
    "head.cls_loc": "roi_heads.box_predictor.bbox_pred",
}
SIMPLE_ROWS = tuple(theirs for theirs, ours in _SIMPLE_LAYERS.items() if ours in ROWS)

# Theirs to ours; all but the convolutions of the ResNet have a weight and a bias.
_DETECTRON2_LAYERS = {
    **{f"backbone.fpn_lateral{i + 2}": f"backbone.fpn.inner_blocks.{i}.0" for i in range(4)},
    **{f"backbone.fpn_output{i + 2}": f"backbone.fpn.layer_blocks.{i}.0" for i in range(4)},
    "proposal_generator.rpn_head.conv": "rpn.head.conv.0.0",
    "proposal_generator.rpn_head.objectness_logits": "rpn.head.cls_logits",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.head.bbox_pred",
    "roi_heads.box_head.fc1": "roi_heads.box_head.fc6",
    "roi_heads.box_head.fc2": "roi_heads.box_head.fc7",
    "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
}
DETECTRON2_ROWS = tuple(theirs for theirs, ours in _DETECTRON2_LAYERS.items() if ours in ROWS)
# MODEL.PIXEL_MEAN and PIXEL_STD of its model zoo: BGR in 0..255.
DETECTRON2_PIXEL_MEAN, DETECTRON2_PIXEL_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
DETECTRON2_SETTINGS = r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+"

# Blocks in the four stages of ResNet-18; 34 and 50; 101; 152.
_RESNETS = ((2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3))

# How the tensors of some layers change, by the layer's name in the state dict that is converted.
Changes = dict[str, Callable[[Tensor], Tensor]]
# Rows in fours of (dy, dx, dh, dw) as (dx, dy, dw, dh), and back.
SWAP_XY: Changes = dict.fromkeys(
    (SIMPLE_ROWS[1], SIMPLE_ROWS[3], ROWS[1], ROWS[3]),
    lambda rows: rows.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1),
)
# The background as the first class with deltas of zero, or as the last class without deltas.
BACKGROUND_FIRST: Changes = {
    DETECTRON2_ROWS[2]: lambda rows: torch.cat([rows[-1:], rows[:-1]]),
    DETECTRON2_ROWS[3]: lambda rows: torch.cat([torch.zeros_like(rows[:4]), rows]),
}
BACKGROUND_LAST: Changes = {
    ROWS[2]: lambda rows: torch.cat([rows[1:], rows[:1]]),
    ROWS[3]: lambda rows: rows[4:],
}


def transpose_anchors(layers: Sequence[str], first: int) -> Changes:
    """The rows of the RPN's two output layers for anchors whose order is transposed, `first` being outermost before."""

    def transpose(values: int) -> Callable[[Tensor], Tensor]:
        return lambda rows: rows.unflatten(0, (first, -1, values)).transpose(0, 1).flatten(0, 2)

    return {layers[0]: transpose(1), layers[1]: transpose(4)}


def simple_names(dropout: bool) -> dict[str, str]:
    """Their names and ours. Dropout stands between the two linear layers, and so moves the second one's index."""
    moved = {"head.classifier.2": "head.classifier.3"} if dropout else {}
    return _add_leaves({moved.get(old, old): new for old, new in _SIMPLE_LAYERS.items()}, ("weight", "bias"))


def detectron2_names(state: Iterable[str], stages: str, first: int) -> dict[str, str]:
    """Their names and ours, for the smallest ResNet that has all the blocks of `state`, in the names of either.

    In the names of `state`, the pattern `stages` precedes the number of a stage, and `first` is the lowest number.
    """
    blocks, bottleneck = [0, 0, 0, 0], False
    for name in state:
        match = re.match(rf"{stages}(\d)\.(\d+)\.(conv3\.)?", name)
        if match and 0 <= int(match[1]) - first < 4:
            stage = int(match[1]) - first
            blocks[stage] = max(blocks[stage], int(match[2]) + 1)
            bottleneck = bottleneck or match[3] is not None
    fitting = [resnet for resnet in _RESNETS if all(map(int.__ge__, resnet, blocks))]
    theirs, ours = "backbone.bottom_up", "backbone.body"
    convolutions = {f"{theirs}.stem.conv1": f"{ours}.conv1"}
    norms = {f"{theirs}.stem.conv1.norm": f"{ours}.bn1"}
    for stage, count in enumerate((fitting or _RESNETS[-1:])[0], start=1):
        for block in range(count):
            old, new = f"{theirs}.res{stage + 1}.{block}", f"{ours}.layer{stage}.{block}"
            for i in range(1, 4 if bottleneck else 3):
                convolutions[f"{old}.conv{i}"] = f"{new}.conv{i}"
                norms[f"{old}.conv{i}.norm"] = f"{new}.bn{i}"
            # Where the number of channels changes: in a first stage of plain blocks it does not.
            if block == 0 and (bottleneck or stage > 1):
                convolutions[f"{old}.shortcut"] = f"{new}.downsample.0"
                norms[f"{old}.shortcut.norm"] = f"{new}.downsample.1"
    return {
        **_add_leaves(convolutions, ("weight",)),
        **_add_leaves(norms, ("weight", "bias", "running_mean", "running_var", TRACKED)),
        **_add_leaves(_DETECTRON2_LAYERS, ("weight", "bias")),
    }


def _add_leaves(layers: Mapping[str, str], leaves: Sequence[str]) -> dict[str, str]:
    return {f"{old}.{leaf}": f"{new}.{leaf}" for old, new in layers.items() for leaf in leaves}


def rename_former(state: dict[str, Any], names: Collection[str]) -> None:
    """Rename, in place, the entries of `state` that have the names of torchvision's detectors before version 0.13.

    `names` are the model's, with the prefix that those of `state` have. A former name stays if the model has it too,
    if the model does not have the present one, or if `state` has both.
    """
    for former in [name for name in state if name not in names]:
        for pattern, replacement in FORMER_NAMES.items():
            present = re.sub(pattern, replacement, former)
            if present != former and present in names and present not in state:
                state[present] = state.pop(former)
