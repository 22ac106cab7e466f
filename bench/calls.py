"""A call of each operation that has kernels, on fixed input: as large as the detector's, or small enough to interpret.

Run as a program it makes the small ones once on the GPU, for compute-sanitizer to watch.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scenes
from fastdet import ops
from fastdet.ops.nms import nms_padded


class OpCall(NamedTuple):
    """`run()` gives the operation's results, new ones each time; `size` describes the size of the input."""

    size: str
    run: Callable[[], Any]


def nms_training(device: torch.device, small: bool) -> OpCall:
    return _nms(device, *((1, 70, 20) if small else (1, 12000, 2000)), threshold=0.7)


def nms_inference(device: torch.device, small: bool) -> OpCall:
    return _nms(device, *((2, 50, 5) if small else (1, 6000, 300)), threshold=0.7)


def nms_untrained(device: torch.device, small: bool) -> OpCall:
    """More survive a step and fewer are kept than of `nms_training`, so that it takes all steps."""
    boxes = untrained_boxes(70 if small else 12000)[None].to(device)
    return _suppress(boxes, 20 if small else 2000, threshold=0.7)


def nms_pyramid(device: torch.device, small: bool) -> OpCall:
    """Five levels of 16 images."""
    return _nms(device, *((3, 50, 20) if small else (5 * 16, 2000, 1000)), threshold=0.7)


def nms_classes(device: torch.device, small: bool) -> OpCall:
    return _nms(device, *((5, 20, 20) if small else (90 * 16, 300, 300)), threshold=0.5)


def nms_classes_of_one(device: torch.device, small: bool) -> OpCall:
    """The classes of one image."""
    return _nms(device, *((4, 40, 10) if small else (90, 1000, 300)), threshold=0.5)


def nms_all(device: torch.device, small: bool) -> OpCall:
    """The boxes of one image, of which all that are to be kept are wanted."""
    return _nms(device, *((1, 40, 40) if small else (1, 1000, 1000)), threshold=0.5)


def _nms(device: torch.device, groups: int, count: int, max_keep: int, *, threshold: float) -> OpCall:
    return _suppress(sorted_boxes(device, groups, count)[0], max_keep, threshold=threshold)


def _suppress(boxes: Tensor, max_keep: int, *, threshold: float) -> OpCall:
    groups, count, _ = boxes.shape
    scores = torch.zeros(groups, count, device=boxes.device)
    return OpCall(
        f"{groups} x {count} to {max_keep}", lambda: nms_padded(boxes, scores, threshold, max_keep, presorted=True)
    )


def sorted_boxes(device: torch.device, groups: int, count: int) -> tuple[Tensor, Tensor]:
    """Boxes to suppress, [groups, count, 4], and their scores, in descending order of these."""
    if groups == 1:
        boxes, scores = (part[None] for part in scenes.jittered_anchors(count))
    else:
        boxes, scores = (part.unflatten(0, (groups, count)) for part in scenes.clustered(groups * count))
    scores, order = scores.sort(dim=1, descending=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return boxes.to(device), scores.to(device)


def untrained_boxes(count: int) -> Tensor:
    """Boxes [count, 4] of an RPN with random weights: its scores and deltas depend on the kind of the anchor most."""
    generator = torch.Generator().manual_seed(5)
    kinds = scenes.anchors().unflatten(0, (-1, 9))
    scores = torch.randn(9, generator=generator) + 0.3 * torch.randn(kinds.shape[:2], generator=generator)
    deltas = 0.1 * torch.randn(9, 4, generator=generator) + 0.03 * torch.randn(kinds.shape, generator=generator)
    center, side = (kinds[..., :2] + kinds[..., 2:]) / 2, kinds[..., 2:] - kinds[..., :2]
    center, side = center + side * deltas[..., :2], side * deltas[..., 2:].exp()
    boxes = torch.cat([center - side / 2, center + side / 2], dim=2).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([901.0, 600.0, 901.0, 600.0]))
    return boxes.flatten(0, 1)[scores.flatten().argsort(descending=True)[:count]]


def match(device: torch.device, small: bool) -> OpCall:
    return _match(device, small, 50)


def match_few(device: torch.device, small: bool) -> OpCall:
    return _match(device, small, 5)


def match_many(device: torch.device, small: bool) -> OpCall:
    return _match(device, small, 90 if small else 5000)


def _match(device: torch.device, small: bool, count: int) -> OpCall:
    anchors, gt_boxes = scenes.anchors()[:: 187 if small else 1].to(device), scenes.uniform(count)[0][None].to(device)
    gt_valid = torch.ones(1, count, dtype=torch.bool, device=device)
    return OpCall(
        f"{len(anchors)} x {count}",
        lambda: ops.match(anchors, gt_boxes, gt_valid, high=0.7, low=0.3, allow_low_quality=True),
    )


def decode(device: torch.device, small: bool) -> OpCall:
    return _decode(device, 2 if small else 1, (3, 5) if small else (37, 56))


def decode_batch(device: torch.device, small: bool) -> OpCall:
    return _decode(device, 3 if small else 16, (3, 5) if small else (37, 56))


def _decode(device: torch.device, batch: int, grid: tuple[int, int]) -> OpCall:
    generator = torch.Generator().manual_seed(0)
    deltas = (torch.randn(batch, 36, *grid, generator=generator) * 0.3).to(device)
    logits = torch.randn(batch, 18, *grid, generator=generator).to(device)
    anchors = scenes.anchors()[:9].to(device)
    sizes = torch.tensor([[600, 901]] * batch, device=device)
    min_side = torch.full((batch,), 16.0, device=device)
    return OpCall(
        f"{batch} x {grid[0] * grid[1] * 9} anchors",
        lambda: ops.decode(deltas, logits, anchors, sizes, stride=(16, 16), min_side=min_side),
    )


def sample_anchors(device: torch.device, small: bool) -> OpCall:
    return _sample(device, *((200, 0.05, 32, 16) if small else (18648, 0.002, 256, 128)))


def sample_proposals(device: torch.device, small: bool) -> OpCall:
    return _sample(device, *((100, 0.1, 16, 4) if small else (2000, 0.1, 128, 32)))


def _sample(device: torch.device, count: int, share: float, num_samples: int, max_positive: int) -> OpCall:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(1, count, generator=generator)
    label = torch.where(draw < share, 1, torch.where(draw < 0.6, 0, -1)).to(device)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    return OpCall(f"{num_samples} of {count}", lambda: ops.sample(label, num_samples, max_positive, seed))


def box_iou(device: torch.device, small: bool) -> OpCall:
    count = 75 if small else 12000
    first, second = (scenes.uniform(count, seed)[0].to(device) for seed in (0, 1))
    return OpCall(f"{count} x {count}", lambda: ops.box_iou(first, second))


def roi_pool(device: torch.device, small: bool) -> OpCall:
    features, rois = _one_level(device, small)
    return OpCall(_describe(features, rois), lambda: ops.roi_pool(features, rois, _bins(small), 1 / 16))


def roi_pool_gradient(device: torch.device, small: bool) -> OpCall:
    features, rois = _one_level(device, small)
    return _gradient([features], rois, _bins(small), lambda: ops.roi_pool(features, rois, _bins(small), 1 / 16))


def roi_pool_training(device: torch.device, small: bool) -> OpCall:
    """As `roi_pool_gradient` in bf16, of RoIs that training samples: a quarter of them lie on a few objects."""
    features, rois = _one_level(device, small)
    generator = torch.Generator().manual_seed(2)
    objects = scenes.uniform(3)[0].repeat(len(rois) // 12 + 1, 1)[: max(len(rois) // 4, 1)]
    objects = objects + 20 * torch.randn(objects.shape, generator=generator)
    rois[: len(objects), 1:] = objects.to(device)
    features = features.bfloat16()
    return _gradient([features], rois, _bins(small), lambda: ops.roi_pool(features, rois, _bins(small), 1 / 16))


def roi_align(device: torch.device, small: bool) -> OpCall:
    levels, rois = _pyramid(device, small)
    return OpCall(_describe(levels[0], rois), _aligned(levels, rois, _bins(small)))


def roi_align_gradient(device: torch.device, small: bool) -> OpCall:
    levels, rois = _pyramid(device, small)
    return _gradient(levels, rois, _bins(small), _aligned(levels, rois, _bins(small)))


def _bins(small: bool) -> int:
    return 3 if small else 7


def _aligned(levels: list[Tensor], rois: Tensor, bins: int) -> Callable[[], Tensor]:
    scales = [2.0**-level for level in range(2, 2 + len(levels))]
    return lambda: ops.multiscale_roi_align(levels, rois, bins, scales)


def _gradient(levels: list[Tensor], rois: Tensor, bins: int, pool: Callable[[], Tensor]) -> OpCall:
    size = _describe(levels[0], rois)
    for level in levels:
        level.requires_grad_()
    shape = len(rois), levels[0].shape[1], bins, bins
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(
        levels[0].device, levels[0].dtype, memory_format=torch.channels_last
    )
    return OpCall(size, lambda: torch.autograd.grad(pool(), levels, grad))


def _one_level(device: torch.device, small: bool) -> tuple[Tensor, Tensor]:
    """Features of VGG16, fp32, and 128 RoIs."""
    shape = (1, 16, 6, 7) if small else (1, 512, 37, 56)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    boxes = scenes.jittered_anchors(5 if small else 128)[0] * (0.15 if small else 1.0)
    return features.to(device, memory_format=torch.channels_last), _rois(boxes).to(device)


def _pyramid(device: torch.device, small: bool) -> tuple[list[Tensor], Tensor]:
    """Four levels of 256 channels, bf16, of an image of 800 x 1216 pixels, and 512 RoIs."""
    grids = [(8, 9), (4, 5)] if small else [(200, 304), (100, 152), (50, 76), (25, 38)]
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, 16 if small else 256, *grid, generator=generator) for grid in grids]
    boxes = scenes.uniform(4 if small else 512)[0] * (0.04 if small else 1.2)
    return [level.to(device, torch.bfloat16, memory_format=torch.channels_last) for level in levels], _rois(boxes).to(
        device
    )


def _rois(boxes: Tensor) -> Tensor:
    return torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)


def _describe(features: Tensor, rois: Tensor) -> str:
    return f"{len(rois)} RoIs of {'x'.join(map(str, features.shape))}, {str(features.dtype).removeprefix('torch.')}"


CALLS: tuple[Callable[[torch.device, bool], OpCall], ...] = (
    nms_training,
    nms_untrained,
    nms_inference,
    nms_pyramid,
    nms_classes,
    nms_classes_of_one,
    nms_all,
    match,
    match_few,
    match_many,
    decode,
    decode_batch,
    sample_anchors,
    sample_proposals,
    box_iou,
    roi_pool,
    roi_pool_gradient,
    roi_pool_training,
    roi_align,
    roi_align_gradient,
)


def tensors(results: Any) -> list[Tensor]:
    """The results of a call, copied into rows of bytes, for comparison bit for bit."""
    return [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors_of(results)]


def tensors_of(results: Any) -> list[Tensor]:
    """The results of a call without a gradient: a tensor, or tuples and lists of tensors, one after another."""
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for each in results for tensor in tensors_of(each)]


class _Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace != "fastdet":
            return func(*args, **(kwargs or {}))
        module = importlib.import_module(f"fastdet.ops.{name.removesuffix('_backward')}")
        return getattr(module, f"{name}_cuda")(*args, **(kwargs or {}))


@contextmanager
def kernels_on(device: torch.device) -> Iterator[None]:
    """Operations on tensors of `device` launch their kernels: on a CPU too, where Triton must interpret."""
    if device.type == "cuda":
        yield
    else:
        with _Kernels():
            yield


if __name__ == "__main__":
    for build in CALLS:
        build(torch.device("cuda"), True).run()
        torch.cuda.synchronize()
        print(build.__name__, flush=True)
