"""Weights of other libraries, in and out: strict loading, and state dicts renamed by tables.

torchvision's names are fastdet's own. A converter takes a state dict as a plain mapping of names to tensors
(`fastdet.weights.read_state_dict` reads one) and gives a new one, whose tensors may share memory with the old.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastdet.weights import files
from fastdet.weights import names as tables
from fastdet.weights.names import DETECTRON2_PIXEL_MEAN, DETECTRON2_PIXEL_STD, PREDICTOR, TRACKED

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
Shape = tuple[int, ...]


class WeightsError(ValueError):
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
        misshapen: Iterable[tuple[str, Shape, Shape]] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = list(missing), list(unexpected), list(misshapen)


def load(
    model: nn.Module,
    weights: str | os.PathLike[str] | State,
    *,
    replace_predictor: bool = False,
    name: str = "the state dict",
) -> None:
    """Load weights into a model, all of them or, if any does not fit, none.

    The names that torchvision's detectors had before version 0.13 are understood. The count of training steps of a
    BatchNorm is dropped where the model's is frozen, and left as it is where the weights have none.

    Args:
        model: a detector of fastdet.
        weights: a file that `fastdet.weights.read_state_dict` reads, or names and tensors.
        replace_predictor: keep the model's own class and box predictor, whatever the weights have for it: for
            training on other classes.
        name: what errors call names and tensors that are not given as a file.

    Raises:
        TensorFileError: the file cannot be read, or does not hold a state dict.
        WeightsError: a name is missing or unexpected, or a shape is another.
    """
    if isinstance(weights, Mapping):
        problem = files.not_a_state_dict(weights)
        if problem:
            raise WeightsError(f"{name} is not one: {problem}")
        state = files.unwrapped(weights)
    else:
        name, state = os.fspath(weights), files.read_state_dict(weights)
    own = model.state_dict()
    rename_former(state, own)
    # A frozen BatchNorm has statistics, but no count.
    steps = [key for key in state if key.endswith(f".{TRACKED}") and key not in own]
    dropped = {key for key in steps if key.removesuffix(TRACKED) + "running_mean" in own}
    kept = {key for key in own if key.endswith(f".{TRACKED}")}
    if replace_predictor:
        dropped |= {key for key in state if key.startswith(PREDICTOR)}
        kept |= {key for key in own if key.startswith(PREDICTOR)}
    state = {key: value for key, value in state.items() if key not in dropped}
    _require_fit(
        f"{name} does not fit the model",
        [key for key in own if key not in state and key not in kept],
        [key for key in state if key not in own],
        [
            (key, tuple(value.shape), tuple(own[key].shape))
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ],
    )
    for key, value in state.items():
        if value.is_meta and not own[key].is_meta:
            raise WeightsError(f"{name} does not fit the model: {key} is on the meta device, without content")
        if value.is_floating_point() != own[key].is_floating_point() or value.is_complex():
            raise WeightsError(f"{name} does not fit the model: {key} holds {value.dtype} in place of {own[key].dtype}")
    model.load_state_dict({**own, **state})


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let a WeightsError of what is done in here begin with the file that the state dict came from."""
    try:
        yield
    except WeightsError as error:
        message = f"{os.fspath(path)}: {error}"
        raise WeightsError(message, error.missing, error.unexpected, error.misshapen) from None


def from_simple_faster_rcnn(state: State) -> dict[str, Tensor]:
    """The weights of a FasterRCNNVGG16 of chenyuntc/simple-faster-rcnn-pytorch, for `fastdet.fasterrcnn_vgg16`.

    Its offsets are (dy, dx, dh, dw). Its anchors, their order, the pairs of logits (background, object), the scales
    of the offsets (1 / 10, 1 / 10, 1 / 5, 1 / 5) and the background as class 0 are those of fastdet.

    Raises:
        WeightsError: a name is missing or unexpected, or a number of rows is wrong.
    """
    names = tables.simple_names(dropout="head.classifier.3.weight" in state)
    wrong = _wrong_rows(state, "rpn.score", "rpn.loc", "head.score", "head.cls_loc", logits=2)
    return _converted(state, names, tables.SWAPPED, wrong, "simple-faster-rcnn-pytorch's VGG16")


def to_simple_faster_rcnn(state: State, *, dropout: bool = False) -> dict[str, Tensor]:
    """The inverse of `from_simple_faster_rcnn`; `dropout`: for a model built with its option `use_drop`.

    Raises:
        WeightsError: a name is missing or unexpected, or a number of rows is wrong.
    """
    names = {ours: theirs for theirs, ours in tables.simple_names(dropout).items()}
    wrong = _wrong_rows(state, *tables.ROWS, logits=2)
    return _converted(state, names, tables.SWAPPED, wrong, "fastdet's VGG16")


def from_detectron2(
    state: State,
    *,
    pixel_mean: Sequence[float] = DETECTRON2_PIXEL_MEAN,
    pixel_std: Sequence[float] = DETECTRON2_PIXEL_STD,
) -> dict[str, Tensor]:
    """The weights of detectron2's Faster R-CNN on a ResNet-18 to 152 with FPN, under torchvision's names.

    Its class scores have the background last, fastdet's first; it has no offsets for the background, for which zeros
    come in. Anchors of one size a level have the same order; offsets and their scales are the same too.

    Old checkpoints carry settings beside the weights, which are checked and left out: the mean and deviation of the
    pixels, and the anchors.

    Args:
        state: its names and tensors.
        pixel_mean, pixel_std: what the model will be given as `image_mean` and `image_std`.

    Raises:
        WeightsError: a name is missing or unexpected, or a number of rows is wrong; the weights were made for pixels
            of another mean or deviation, or for anchors of several sizes a level.
    """
    settings = {name for name in state if re.fullmatch(tables.DETECTRON2_SETTINGS, name)}
    _check_detectron2_settings({name: state[name] for name in settings}, pixel_mean, pixel_std)
    weights = {name: value for name, value in state.items() if name not in settings}
    blocks = tables.blocks_of(weights, r"backbone\.bottom_up\.res(\d)\.(\d+)\.", first=2)
    names = tables.detectron2_names(blocks, bottleneck=any(re.search(r"res\d\.\d+\.conv3\.", name) for name in weights))
    rpn, predictor = "proposal_generator.rpn_head", "roi_heads.box_predictor"
    rows = f"{rpn}.objectness_logits", f"{rpn}.anchor_deltas", f"{predictor}.cls_score", f"{predictor}.bbox_pred"
    wrong = _wrong_rows(weights, *rows, background_box=False)
    return _converted(weights, names, tables.BACKGROUND_FIRST, wrong, "detectron2's Faster R-CNN with FPN")


def to_detectron2(state: State) -> dict[str, Tensor]:
    """The inverse of `from_detectron2`; the offsets of the background, which nothing uses, are left out.

    Raises:
        WeightsError: a name is missing or unexpected, or a number of rows is wrong.
    """
    blocks = tables.blocks_of(state, r"backbone\.body\.layer(\d)\.(\d+)\.", first=1)
    bottleneck = any(re.search(r"layer\d\.\d+\.conv3\.", name) for name in state)
    names = {ours: theirs for theirs, ours in tables.detectron2_names(blocks, bottleneck).items()}
    return _converted(
        state, names, tables.BACKGROUND_LAST, _wrong_rows(state, *tables.ROWS), "fastdet's Faster R-CNN with FPN"
    )


def rename_former(state: dict[str, Any], own: State) -> None:
    """Give the entries of `state` that have the names of torchvision's detectors before version 0.13 the present ones.

    In place, and only where `own`, the model's state, has the present name and not the former. The names may have a
    prefix.
    """
    for name in [name for name in state if name not in own]:
        for pattern, replacement in _FORMER_NAMES.items():
            present = re.sub(pattern, replacement, name)
            if present != name and present in own and present not in state:
                state[present] = state.pop(name)


# The names in torchvision's detectors before version 0.13, and the present ones.
_FORMER_NAMES = {
    r"rpn\.head\.conv\.(weight|bias)$": r"rpn.head.conv.0.0.\1",
    r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)$": r"backbone.fpn.\1_blocks.\2.0.\3",
}


def _converted(
    state: State, names: Mapping[str, str], changes: tables.Changes, wrong: list[tuple[str, Shape, Shape]], what: str
) -> dict[str, Tensor]:
    """The tensors under their new names, those of some layers changed. Counts of training steps may be missing."""
    _require_fit(
        f"the state dict is not one of {what}",
        [name for name in names if name not in state and not name.endswith(TRACKED)],
        [name for name in state if name not in names],
        wrong,
    )
    result = {}
    for name, value in state.items():
        change = changes.get(name.rpartition(".")[0])
        result[names[name]] = change(value) if change else value
    return result


def _rows(state: State, layer: str) -> int:
    weight = state.get(f"{layer}.weight")
    return 0 if weight is None or weight.ndim == 0 else len(weight)


def _wrong_rows(
    state: State, objectness: str, offsets: str, scores: str, boxes: str, logits: int = 1, background_box: bool = True
) -> list[tuple[str, Shape, Shape]]:
    """The layers whose rows do not go with the number of anchors (by objectness) and of classes (by scores)."""
    anchors, classes = -(-_rows(state, objectness) // logits), _rows(state, scores)
    wanted = {
        objectness: logits * anchors,
        offsets: 4 * anchors,
        scores: classes,
        boxes: 4 * (classes if background_box else classes - 1),
    }
    wrong = []
    for layer, count in wanted.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            shape = tuple(state[name].shape) if name in state else ()
            # Without the layer that says how many, it is missing: no need to say more.
            if name in state and count > 0 and shape[:1] != (count,):
                wrong.append((name, shape, (count, *shape[1:])))
    return wrong


def _check_detectron2_settings(settings: State, mean: Sequence[float], std: Sequence[float]) -> None:
    for name, wanted in (("pixel_mean", mean), ("pixel_std", std)):
        found = settings[name].flatten().tolist() if name in settings else list(wanted)
        if len(found) != len(wanted) or any(abs(a - b) > 1e-3 for a, b in zip(found, wanted, strict=True)):
            numbers = tuple(round(number, 4) for number in found)
            raise WeightsError(
                f"the state dict was made for a {name} of {numbers}, not {tuple(wanted)}: give the model these numbers "
                f"as {name.replace('pixel', 'image')}, and from_detectron2 as {name}"
            )
    for name, value in settings.items():
        if "cell_anchors" in name:
            area = (value[:, 2] - value[:, 0]) * (value[:, 3] - value[:, 1])
            if area.max() > 1.01 * area.min():
                raise WeightsError(
                    "the state dict was made for anchors of several sizes a level, whose order is not fastdet's "
                    f"({name} has areas from {area.min():.0f} to {area.max():.0f})"
                )


def _require_fit(
    what: str, missing: list[str], unexpected: list[str], misshapen: list[tuple[str, Shape, Shape]]
) -> None:
    """Raise WeightsError if there is anything in these lists."""
    counts = [(len(misshapen), "misshapen"), (len(missing), "missing"), (len(unexpected), "unexpected")]
    if not any(count for count, _ in counts):
        return
    shown = [f"{name} is {list(found)} in place of {list(wanted)}" for name, found, wanted in misshapen]
    shown += [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    more = [f"and {len(shown) - 5} more"] if len(shown) > 5 else []
    message = f"{what}: {', '.join(f'{count} {kind}' for count, kind in counts if count)}"
    message += f" ({'; '.join(shown[:5] + more)})"
    raise WeightsError(message + _hint(missing, unexpected, misshapen), missing, unexpected, misshapen)


def _hint(missing: list[str], unexpected: list[str], misshapen: list[tuple[str, Shape, Shape]]) -> str:
    """What to do about it, where that is plain."""
    for prefix, converter in (("extractor.", "from_simple_faster_rcnn"), ("proposal_generator.", "from_detectron2")):
        if any(name.startswith(prefix) for name in unexpected):
            return f"; fastdet.weights.{converter} converts such names"
    classes = [(found, wanted) for name, found, wanted in misshapen if name == f"{PREDICTOR}cls_score.weight"]
    if not classes or not all(name.startswith(PREDICTOR) for name, _, _ in misshapen):
        return ""
    (found, wanted), alone = classes[0], not missing and not unexpected
    way_out = "; replace_predictor=True loads all but the predictor" if alone else ""
    return f"; the weights have {found[0]} classes, the model {wanted[0]}, the background included{way_out}"
