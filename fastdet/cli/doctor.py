"""What this machine has, whether the detector runs on it as it should, and how much memory a training step needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdet.models.anchors import AnchorGenerator
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.preserve import preserve_mode, preserve_rng, preserve_tensors
from fastdet.structures import Detections, Targets

_PACKAGES = ("fastdet", "torch", "torchvision", "triton", "numpy")
_PROBE: dict[str, Any] = {
    "min_size": 128,
    "max_size": 128,
    "rpn_anchor_generator": AnchorGenerator(sizes=((24, 40, 64),), offset=4.0),
}


class Memory(NamedTuple):
    """Bytes of a training step: of parameters, of their gradients, and of what is kept for the backward pass."""

    parameters: int
    gradients: int
    activations: int


def environment(device: torch.device) -> list[str]:
    """Lines that name the versions, the device and what its kernels need."""
    versions = ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)
    lines = [f"Python {platform.python_version()} on {platform.system()}, {platform.machine()}", versions]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
        lines.append(
            f"device: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.1f} GiB"
        )
        lines.append(f"C compiler, for the launchers of Triton's kernels: {compiler or 'none: they cannot be built'}")
    else:
        lines.append(f"device: cpu, {torch.get_num_threads()} threads; the operations' CPU implementations run")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def probe(device: torch.device) -> str | None:
    """Train and use a small detector for a step; None if all is well, else what is not.

    On a GPU its detections have to be those of the same detector on the CPU, to a tenth of a pixel; a few of them may
    differ, since scores that are nearly equal may change places by the last bit.
    """
    with preserve_rng(device):
        torch.manual_seed(0)
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return _probe(device)


def _probe(device: torch.device) -> str | None:
    model = FasterRCNN("small", 5, **_PROBE)
    images, targets = torch.rand(2, 3, 128, 128), _targets(2, 128, 128)
    sizes = torch.tensor([[128, 128], [112, 96]])
    expected = _detections(model.eval(), images, sizes)
    model.to(device)
    images, sizes, targets = images.to(device), sizes.to(device), Targets(*(part.to(device) for part in targets))
    found = Detections(*(part.cpu() for part in _detections(model, images, sizes)))
    alone = alone_in(found, expected), alone_in(expected, found)
    total = int(found.count.sum() + expected.count.sum())
    if not total:
        return "no detections, neither on the CPU"
    if sum(alone) > 0.02 * total:
        return f"{alone[0]} detections that the CPU has not, {alone[1]} that it has alone, of {total}"
    losses = model.train().forward_padded(images, sizes, targets)[0]
    assert losses is not None
    torch.stack(list(losses.values())).sum().backward()
    wrong = [name for name, loss in losses.items() if not loss.isfinite()]
    wrong += [
        f"the gradient of {name}"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return f"not finite: {', '.join(wrong)}" if wrong else None


def alone_in(detections: Detections, others: Detections, pixels: float = 0.1, score: float = 1e-3) -> int:
    """How many detections have none beside them among the `others`, of the same image and label, so near, so sure."""
    rows = torch.arange(detections.boxes.shape[1])
    there, others_there = (rows < each.count[:, None] for each in (detections, others))
    near = (detections.boxes[:, :, None] - others.boxes[:, None]).abs().amax(-1) <= pixels
    near &= (detections.scores[:, :, None] - others.scores[:, None]).abs() <= score
    near &= (detections.labels[:, :, None] == others.labels[:, None]) & others_there[:, None]
    return int((there & ~near.any(2)).sum())


@torch.no_grad()
def _detections(model: FasterRCNN, images: Tensor, sizes: Tensor) -> Detections:
    found = model.forward_padded(images, sizes)[1]
    assert found is not None
    return found


def _targets(batch: int, height: int, width: int) -> Targets:
    """Two boxes of class 1 for each image, in its middle."""
    middle = torch.tensor([[0.2, 0.2, 0.6, 0.7], [0.4, 0.3, 0.9, 0.8]]) * torch.tensor([width, height, width, height])
    labels = torch.ones(batch, 2, dtype=torch.int64)
    return Targets(middle.expand(batch, 2, 4), labels, torch.zeros_like(labels, dtype=torch.bool))


def training_memory(model: FasterRCNN, batch: int, height: int, width: int) -> Memory:
    """Measured in a forward pass of `model`, where it lies, over `batch` images of that padded size; it stays as it is.

    Activations are the storages that autograd keeps, each counted once and none of the parameters'.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    own = {parameter.untyped_storage().data_ptr() for parameter in (*parameters, *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no later storage takes its place
        return tensor

    channels = len(model.settings.image_mean)
    images = torch.zeros(batch, channels, height, width, device=device)
    sizes = torch.tensor([[height, width]] * batch, device=device)
    targets = Targets(*(part.to(device) for part in _targets(batch, height, width)))
    with (
        preserve_rng(device),
        preserve_tensors(list(model.buffers())),
        preserve_mode(model, training=True),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.forward_padded(images, sizes, targets)
    return Memory(
        sum(parameter.nbytes for parameter in parameters),
        sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        sum(kept.values()),
    )


def told(memory: Memory) -> str:
    """One line on the bytes of a step, in MiB."""
    parts = zip(("parameters", "gradients", "activations kept for the backward pass"), memory, strict=True)
    return ", ".join(f"{name} {number / 2**20:.1f} MiB" for name, number in parts)
