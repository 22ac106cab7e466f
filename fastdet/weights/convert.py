"""Weights of other libraries, in and out: strict loading, and state dicts renamed by tables.

fastdet's names are torchvision's. A converter takes a state dict as a plain mapping of names to tensors
(`fastdet.weights.read_state_dict` reads one) and gives a new one, whose tensors may share memory with the old.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastdet.safe_files import FileError, StrPath
from fastdet.weights import files
from fastdet.weights import names as tables
from fastdet.weights.names import DETECTRON2_PIXEL_MEAN, DETECTRON2_PIXEL_STD, PREDICTOR, TRACKED, rename_former

# How simple-faster-rcnn-pytorch feeds its models, as settings of `fastdet.FasterRCNN`: those that began with
# torchvision's VGG16, and those that began with Caffe's.
SIMPLE_FASTER_RCNN_TORCH_INPUT: dict[str, Any] = {
    "image_format": "rgb",
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
SIMPLE_FASTER_RCNN_CAFFE_INPUT: dict[str, Any] = {
    "image_format": "bgr255",
    # Its images are BGR, but the mean of red, the first, is taken from their blue. Its models were trained so.
    "image_mean": (122.7717, 115.9465, 102.9801),
    "image_std": (1.0, 1.0, 1.0),
}
State = Mapping[str, Tensor]
Misshapen = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, shape found, shape wanted


class WeightsError(FileError):
    """A state dict does not fit. The message is one line: how many mismatches of each kind, and the first of them.

    Attributes:
        missing: every name that is wanted and not there.
        unexpected: every name that is there and not wanted.
        misshapen: every name whose tensor has another shape: (name, the shape found, the shape wanted).
    """

    def __init__(
        self,
        message: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[Misshapen] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = list(missing), list(unexpected), list(misshapen)


def load(
    model: nn.Module, weights: StrPath | State, *, replace_predictor: bool = False, name: str = "the state dict"
) -> None:
    """Load weights into a model, all of them or, if any does not fit, none: see `fit`."""
    model.load_state_dict(fit(model, weights, replace_predictor=replace_predictor, name=name))


def fit(
    model: nn.Module, weights: StrPath | State, *, replace_predictor: bool = False, name: str = "the state dict"
) -> dict[str, Tensor]:
    """The state dict of a model with these weights, all of them.

    The names that torchvision's detectors had before version 0.13 are accepted. The count of training steps of a
    BatchNorm is dropped where the model's is frozen, and left as it is where the weights have none.

    Args:
        model: a detector of fastdet.
        weights: a file that `fastdet.weights.read_state_dict` reads, or names and tensors.
        replace_predictor: keep the model's present class and box predictor, whether or not the weights have one: for
            training on other classes.
        name: what errors call names and tensors that are not given as a file.

    Raises:
        TensorFileError: the file cannot be read, or does not hold a state dict.
        WeightsError: a name is missing or unexpected, a shape is another, or a value is not finite.
    """
    if isinstance(weights, Mapping):
        if problem := files.describe_problem(weights):
            raise WeightsError(f"{name} is not one: {problem}")
        state = files.unwrap_prefixes(weights)
    else:
        name, state = os.fspath(weights), files.read_state_dict(weights)
    if problem := files.describe_values(state):
        raise WeightsError(f"{name}: {problem}")
    present, count, replaced = model.state_dict(), f".{TRACKED}", (PREDICTOR,) if replace_predictor else ()
    rename_former(state, present)
    # A frozen BatchNorm has statistics, but no count.
    frozen = {
        key
        for key in state
        if key.endswith(count) and key not in present and key.removesuffix(TRACKED) + "running_mean" in present
    }
    state = {key: value for key, value in state.items() if key not in frozen and not key.startswith(replaced)}
    _require_fit(
        f"{name} does not fit the model",
        [key for key in present if key not in state and not key.endswith(count) and not key.startswith(replaced)],
        [key for key in state if key not in present],
        [
            (key, tuple(value.shape), tuple(present[key].shape))
            for key, value in state.items()
            if key in present and value.shape != present[key].shape
        ],
    )
    for key, value in state.items():
        if value.is_meta and not present[key].is_meta:
            raise WeightsError(f"{name} does not fit the model: {key} is on the meta device, without content")
        wanted = present[key].dtype
        if value.is_floating_point() != wanted.is_floating_point or value.is_complex():
            raise WeightsError(f"{name} does not fit the model: {key} holds {value.dtype} in place of {wanted}")
    return {**present, **state}


@contextmanager
def prefix_errors(path: StrPath) -> Iterator[None]:
    """Let the message of a WeightsError begin with the file that the state dict came from."""
    try:
        yield
    except WeightsError as error:
        error.args = (f"{os.fspath(path)}: {error}",)
        raise


def from_simple_faster_rcnn(state: State) -> dict[str, Tensor]:
    """The weights of a FasterRCNNVGG16 of chenyuntc/simple-faster-rcnn-pytorch, for `fastdet.fasterrcnn_vgg16`.

    Its deltas are (dy, dx, dh, dw). Its anchors, their order, the pairs of logits (background, object), the scales
    of the deltas (1 / 10, 1 / 10, 1 / 5, 1 / 5) and the background as class 0 are those of fastdet.

    Raises:
        WeightsError: a name is missing or unexpected, or a number of rows is wrong.
    """
    names = tables.simple_names(dropout="head.classifier.3.weight" in state)
    return _convert(state, names, tables.SIMPLE_ROWS, tables.SWAP_XY, "simple-faster-rcnn-pytorch's VGG16", logits=2)


def to_simple_faster_rcnn(state: State, *, dropout: bool = False) -> dict[str, Tensor]:
    """The inverse of `from_simple_faster_rcnn`, with its errors; `dropout`: for a model built with `use_drop`."""
    names = {ours: theirs for theirs, ours in tables.simple_names(dropout).items()}
    return _convert(state, names, tables.ROWS, tables.SWAP_XY, "fastdet's VGG16", logits=2)


def from_detectron2(
    state: State,
    *,
    pixel_mean: Sequence[float] = DETECTRON2_PIXEL_MEAN,
    pixel_std: Sequence[float] = DETECTRON2_PIXEL_STD,
    sizes_per_level: int = 1,
) -> dict[str, Tensor]:
    """The weights of detectron2's Faster R-CNN on a ResNet-18 to 152 with FPN, under torchvision's names.

    Its class scores have the background last, fastdet's first; it has no deltas for the background, which get zeros.
    Its anchors of a cell are in the order of their sizes, fastdet's in that of their aspect ratios: the rows of the
    RPN's head are permuted. Deltas and their scales are the same.

    Old checkpoints have settings beside the weights, which are checked and left out: the mean and deviation of the
    pixels, and the anchors.

    Args:
        state: its names and tensors.
        pixel_mean, pixel_std: the `image_mean` and `image_std` of the model that the weights are for.
        sizes_per_level: how many sizes of anchors a level has. Only old checkpoints tell.

    Raises:
        WeightsError: a name is missing or unexpected, or a number of rows is wrong; the weights were made for pixels
            of another mean or deviation, or for another number of sizes of anchors.
    """
    settings = {name: value for name, value in state.items() if re.fullmatch(tables.DETECTRON2_SETTINGS, name)}
    _check_detectron2_settings(settings, pixel_mean, pixel_std, sizes_per_level)
    state = {name: value for name, value in state.items() if name not in settings}
    names = tables.detectron2_names(state, r"backbone\.bottom_up\.res", first=2)
    source, rows = "detectron2's Faster R-CNN with FPN", tables.DETECTRON2_ROWS
    _count_anchors(state, rows[0], sizes_per_level)
    changes = tables.BACKGROUND_FIRST | tables.transpose_anchors(rows, first=sizes_per_level)
    return _convert(state, names, rows, changes, source, background_deltas=False)


def to_detectron2(state: State, *, sizes_per_level: int = 1) -> dict[str, Tensor]:
    """The inverse of `from_detectron2`, with its errors; the background's deltas, which nothing uses, are left out."""
    theirs_to_ours = tables.detectron2_names(state, r"backbone\.body\.layer", first=1)
    names, rows = {ours: theirs for theirs, ours in theirs_to_ours.items()}, tables.ROWS
    anchors = _count_anchors(state, rows[0], sizes_per_level)
    changes = tables.BACKGROUND_LAST | tables.transpose_anchors(rows, first=anchors // sizes_per_level)
    return _convert(state, names, rows, changes, "fastdet's Faster R-CNN with FPN")


def _count_anchors(state: State, objectness: str, sizes_per_level: int) -> int:
    """The number of anchors of a cell, which is a multiple of that of their sizes; any if the layer is missing."""
    bias = state.get(f"{objectness}.bias")
    anchors = sizes_per_level if bias is None else len(bias)
    if sizes_per_level < 1 or anchors % sizes_per_level:
        raise WeightsError(f"{anchors} anchors of a cell cannot have sizes_per_level={sizes_per_level} sizes")
    return anchors


def _convert(
    state: State,
    names: Mapping[str, str],
    rows: Sequence[str],
    changes: tables.Changes,
    source: str,
    *,
    logits: int = 1,
    background_deltas: bool = True,
) -> dict[str, Tensor]:
    """The tensors under their new names, those of some layers changed. Counts of training steps may be missing."""
    _require_fit(
        f"the state dict is not one of {source}",
        [name for name in names if name not in state and not name.endswith(TRACKED)],
        [name for name in state if name not in names],
        _find_wrong_rows(state, rows, logits, background_deltas),
    )
    result = {}
    for name, value in state.items():
        change = changes.get(name.rpartition(".")[0])
        result[names[name]] = change(value) if change else value
    return result


def _find_wrong_rows(state: State, layers: Sequence[str], logits: int, background_deltas: bool) -> list[Misshapen]:
    """The tensors whose rows contradict the number of anchors (by objectness) or of classes (by class scores)."""
    objectness, anchor_deltas, scores, class_deltas = layers
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    objectness_rows, classes = ((shapes.get(f"{layer}.weight") or (0,))[0] for layer in (objectness, scores))
    anchors = -(-objectness_rows // logits)
    wanted = {
        objectness: logits * anchors,
        anchor_deltas: 4 * anchors,
        scores: classes,
        class_deltas: 4 * (classes if background_deltas else classes - 1),
    }
    return [
        (name, shapes[name], (count, *shapes[name][1:]))
        for layer, count in wanted.items()
        for name in (f"{layer}.weight", f"{layer}.bias")
        # Not above 0: the layer that gives the number is missing, which is reported already.
        if name in shapes and count > 0 and shapes[name][:1] != (count,)
    ]


def _check_detectron2_settings(
    settings: State, mean: Sequence[float], std: Sequence[float], sizes_per_level: int
) -> None:
    for name, wanted in (("pixel_mean", mean), ("pixel_std", std)):
        found = settings[name].flatten().tolist() if name in settings else list(wanted)
        if len(found) != len(wanted) or any(abs(a - b) > 1e-3 for a, b in zip(found, wanted, strict=True)):
            raise WeightsError(
                f"the state dict was made for a {name} of {tuple(round(value, 4) for value in found)}, not "
                f"{tuple(wanted)}: give the model these values as {name.replace('pixel', 'image')}, and "
                f"from_detectron2 as {name}"
            )
    for name, value in settings.items():
        if "cell_anchors" in name:
            area = ((value[:, 2] - value[:, 0]) * (value[:, 3] - value[:, 1])).sort().values
            found_sizes = 1 + int((area[1:] > 1.01 * area[:-1]).sum())
            if found_sizes != sizes_per_level:
                raise WeightsError(
                    f"the state dict was made for anchors of {found_sizes} sizes a level ({name} has areas from "
                    f"{area[0]:.0f} to {area[-1]:.0f}), not {sizes_per_level}: give from_detectron2 sizes_per_level"
                )


def _require_fit(what: str, missing: list[str], unexpected: list[str], misshapen: list[Misshapen]) -> None:
    """Raise WeightsError if there is anything in these lists."""
    mismatches = {
        "misshapen": [f"{name} is {list(found)} in place of {list(wanted)}" for name, found, wanted in misshapen],
        "missing": [f"{name} is missing" for name in missing],
        "unexpected": [f"{name} is unexpected" for name in unexpected],
    }
    shown = [line for lines in mismatches.values() for line in lines]
    if not shown:
        return
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in mismatches.items() if lines)
    more = [f"and {len(shown) - 5} more"] if len(shown) > 5 else []
    message = f"{what}: {counts} ({'; '.join(shown[:5] + more)}){_suggest_remedy(missing, unexpected, misshapen)}"
    raise WeightsError(message, missing, unexpected, misshapen)


def _suggest_remedy(missing: list[str], unexpected: list[str], misshapen: list[Misshapen]) -> str:
    """What to do about mismatches, where that is plain."""
    for prefix, converter in (("extractor.", "from_simple_faster_rcnn"), ("proposal_generator.", "from_detectron2")):
        if any(name.startswith(prefix) for name in unexpected):
            return f"; fastdet.weights.{converter} converts such names"
    scores = f"{PREDICTOR}cls_score.weight"
    classes = [(found, wanted) for name, found, wanted in misshapen if name == scores and found]
    if not classes or not all(name.startswith(PREDICTOR) for name, _, _ in misshapen):
        return ""
    found, wanted = classes[0]
    remedy = "" if missing or unexpected else "; replace_predictor=True loads all but the predictor"
    return f"; the weights have {found[0]} classes, the model {wanted[0]}, the background included{remedy}"
