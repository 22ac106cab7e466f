import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from bench import roofline
from fastdet import ops

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="large: only on a GPU")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="small: only without a GPU")
sizes = pytest.mark.parametrize(
    ("images", "side", "channels", "num_rois", "dtype"),
    [
        pytest.param(1, (320, 480), 128, 256, torch.float32, marks=on_cpu),
        pytest.param(1, (800, 1216), 256, 512, torch.float32, marks=on_gpu),
        pytest.param(1, (800, 1216), 256, 512, torch.bfloat16, marks=on_gpu),
        pytest.param(8, (800, 1216), 256, 512, torch.bfloat16, marks=on_gpu),
    ],
)


def training_inputs(
    images: int, side: tuple[int, int], channels: int, num_rois: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Four levels of a feature pyramid, and boxes [images, num_rois, 4] of 16 to 512 pixels, so of every level."""
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(images, channels, *(round(length * scale) for length in side), generator=generator)
        for scale in SCALES
    ]
    height, width = side
    limit = torch.tensor([width, height], dtype=torch.float32)
    center = torch.rand(images, num_rois, 2, generator=generator) * limit
    length = 16 * torch.exp2(5 * torch.rand(images, num_rois, 1, generator=generator))
    shape = torch.exp2(torch.rand(images, num_rois, 1, generator=generator) - 0.5)
    half = length * torch.cat([shape, 1 / shape], dim=2) / 2
    boxes = torch.cat([center - half, center + half], dim=2).clamp(min=0).minimum(limit.repeat(2))
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return [level.to(device, dtype, memory_format=layout) for level in levels], boxes.to(device)


class TorchvisionPooling:
    """torchvision's pooler, which does not support bf16: features are upcast, as autocast does."""

    def __init__(self, side: tuple[int, int]) -> None:
        self.pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        self.side = side

    def __call__(self, levels: list[Tensor], boxes: Tensor) -> Tensor:
        named = {str(number): level.float() for number, level in enumerate(levels)}
        return self.pooler(named, list(boxes), [self.side] * len(boxes)).to(levels[0].dtype)


def our_pooling(levels: list[Tensor], boxes: Tensor) -> Tensor:
    return ops.batched_roi_align(levels, boxes, 7, SCALES).flatten(0, 1)


def describe(levels: list[Tensor], boxes: Tensor) -> str:
    return f"{boxes.shape[0] * boxes.shape[1]} RoIs of {'x'.join(map(str, levels[0].shape))} .. to 7x7"


def floor(levels: list[Tensor], boxes: Tensor) -> tuple[roofline.Work]:
    num_outputs = boxes.shape[0] * boxes.shape[1] * levels[0].shape[1] * 49
    return roofline.roi_align(sum(level.numel() for level in levels), num_outputs, levels[0].element_size())


@sizes
def test_forward(compare, device, images, side, channels, num_rois, dtype):
    levels, boxes = training_inputs(images, side, channels, num_rois, dtype, device)
    their_pooling = TorchvisionPooling(side)
    # On a GPU a box at the edge of a level may go to another one there.
    differing = (our_pooling(levels, boxes) - their_pooling(levels, boxes)).flatten(1).abs().amax(1) > 0.05
    assert differing.sum() <= (0 if device.type == "cpu" else 2)
    compare(
        lambda: our_pooling(levels, boxes),
        lambda: their_pooling(levels, boxes),
        op="roi_align",
        size=describe(levels, boxes),
        dtype=str(dtype).removeprefix("torch."),
        floor=floor(levels, boxes),
        graph=True,
    )


@sizes
def test_forward_and_backward(compare, device, images, side, channels, num_rois, dtype):
    levels, boxes = training_inputs(images, side, channels, num_rois, dtype, device)
    their_pooling = TorchvisionPooling(side)
    for level in levels:
        level.requires_grad_()
    grad = torch.randn(images * num_rois, channels, 7, 7, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(our_pooling(levels, boxes), levels, grad)

    def theirs() -> tuple[Tensor, ...]:
        return torch.autograd.grad(their_pooling(levels, boxes), levels, grad)

    if device.type == "cpu":  # on a GPU torchvision adds in no fixed order
        assert all(map(torch.equal, ours(), theirs()))
    compare(
        ours,
        theirs,
        op="roi_align with gradient",
        size=describe(levels, boxes),
        dtype=str(dtype).removeprefix("torch."),
        rounds=5,
        floor=floor(levels, boxes) * 2,
        graph=True,
    )
