"""The environment, a self-check of the detector, and the memory of a training step: `fastdet doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import NamedTuple

import torch
from torch import Tensor

from fastdet.models.anchors import AnchorGenerator
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.preserve import preserve_mode, preserve_rng, preserve_tensors
from fastdet.structures import Detections, Targets


class SelfCheckError(Exception):
    """The self-check failed; the message is one line."""


class Memory(NamedTuple):
    """Bytes of a training step: of parameters, of their gradients, and of what is kept for the backward pass."""

    parameters: int
    gradients: int
    activations: int

    def __str__(self) -> str:
        parameters, gradients, activations = (f"{size / 2**20:.1f} MiB" for size in self)
        return f"parameters {parameters}, gradients {gradients}, activations kept for the backward pass {activations}"


def describe_environment(device: torch.device) -> list[str]:
    """Lines with the versions, the device and what its kernels need."""
    packages = ("fastdet", "torch", "torchvision", "triton", "numpy")
    lines = [
        f"Python {platform.python_version()} on {platform.system()}, {platform.machine()}",
        ", ".join(f"{package} {_installed_version(package)}" for package in packages),
    ]
    if device.type != "cuda":
        return [*lines, f"device: cpu, {torch.get_num_threads()} threads; the operations' CPU implementations run"]
    properties = torch.cuda.get_device_properties(device)
    capability, memory = f"{properties.major}.{properties.minor}", f"{properties.total_memory / 2**30:.1f} GiB"
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or "none: they cannot be built"
    lines.append(f"device: {properties.name}, compute capability {capability}, {memory}")
    return [*lines, f"C compiler, for the launchers of Triton's kernels: {compiler}"]


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def run_self_check(device: torch.device) -> str | None:
    """Detect and train with a small detector for a step; returns the problem in one line, None if there is none.

    On a GPU its detections have to be those of the same detector on the CPU, to a tenth of a pixel; five in a hundred
    may differ (on an H100 two do), since scores that are nearly equal may change places by the last bit.
    """
    with preserve_rng(device), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        torch.manual_seed(0)
        anchors = AnchorGenerator(sizes=((24, 40, 64),), offset=4.0)
        model = FasterRCNN("small", 5, min_size=128, max_size=128, rpn_anchor_generator=anchors)
        images, targets = torch.rand(2, 3, 128, 128), _make_targets(2, 128, 128)
        sizes = torch.tensor([[128, 128], [112, 96]])
        expected = _detect_padded(model.eval(), images, sizes)
        model.to(device)
        images, sizes, targets = images.to(device), sizes.to(device), targets.map(lambda part: part.to(device))
        found = Detections(*(part.cpu() for part in _detect_padded(model, images, sizes)))
        extra, missing = count_unmatched(found, expected), count_unmatched(expected, found)
        total = int(found.count.sum() + expected.count.sum())
        if not total:
            return "no detections, neither on the CPU"
        if extra + missing > 0.05 * total:
            return f"{extra} detections are not found on the CPU, {missing} only there, of {total}"
        losses = model.train().forward_padded(images, sizes, targets)[0]
        assert losses is not None
        torch.stack(list(losses.values())).sum().backward()
    values = {**losses, **{f"the gradient of {name}": p.grad for name, p in model.named_parameters()}}
    problems = [name for name, value in values.items() if value is not None and not value.isfinite().all()]
    return f"not finite: {', '.join(problems)}" if problems else None


def count_unmatched(detections: Detections, others: Detections, pixels: float = 0.1, score: float = 1e-3) -> int:
    """How many detections have no counterpart in the `others`: of the same image and label, with box and score close.

    Args:
        detections, others: of the same images, each [B, D], with counts.
        pixels: largest difference of a coordinate.
        score: largest difference of the scores.
    """
    rows = torch.arange(detections.boxes.shape[1])
    valid, others_valid = (rows < each.count[:, None] for each in (detections, others))
    matched = (detections.boxes[:, :, None] - others.boxes[:, None]).abs().amax(-1) <= pixels
    matched &= (detections.scores[:, :, None] - others.scores[:, None]).abs() <= score
    matched &= (detections.labels[:, :, None] == others.labels[:, None]) & others_valid[:, None]
    return int((valid & ~matched.any(2)).sum())


@torch.no_grad()
def _detect_padded(model: FasterRCNN, images: Tensor, sizes: Tensor) -> Detections:
    detections = model.forward_padded(images, sizes)[1]
    assert detections is not None
    return detections


def _make_targets(batch: int, height: int, width: int) -> Targets:
    """Two boxes of class 1 for each image, in its middle."""
    boxes = torch.tensor([[0.2, 0.2, 0.6, 0.7], [0.4, 0.3, 0.9, 0.8]]) * torch.tensor([width, height, width, height])
    labels = torch.ones(batch, 2, dtype=torch.int64)
    return Targets(boxes.expand(batch, 2, 4), labels, torch.zeros_like(labels, dtype=torch.bool))


def measure_training_memory(model: FasterRCNN, batch: int, height: int, width: int) -> Memory:
    """Measured in a forward pass of `model`, on its device, over `batch` images of that padded size; it is unchanged.

    Activations are the storages that autograd keeps, each counted once and none of the parameters'.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    excluded = {tensor.untyped_storage().data_ptr() for tensor in (*parameters, *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no later storage takes its place
        return tensor

    images = torch.zeros(batch, len(model.settings.image_mean), height, width, device=device)
    sizes = torch.tensor([[height, width]] * batch, device=device)
    targets = _make_targets(batch, height, width).map(lambda part: part.to(device))
    with (
        preserve_rng(device),
        preserve_tensors(list(model.buffers())),
        preserve_mode(model, training=True),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.forward_padded(images, sizes, targets)
    trainable = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return Memory(sum(parameter.nbytes for parameter in parameters), trainable, sum(kept.values()))
