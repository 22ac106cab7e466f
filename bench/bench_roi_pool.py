import pytest
import torch
import torchvision
from torch import Tensor

from bench import roofline, scenes
from fastdet import ops

SCALE = 1 / 16
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="large: only on a GPU")
sizes = pytest.mark.parametrize(
    ("images", "dtype"),
    [(1, torch.float32), *(pytest.param(images, torch.bfloat16, marks=on_gpu) for images in (1, 16))],
)


def training_inputs(images: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of VGG16, on a GPU channels-last, and 128 RoIs for each image."""
    features = torch.randn(images, 512, 37, 56, generator=torch.Generator().manual_seed(0)).relu()
    boxes, _ = scenes.jittered_anchors(images * 128)
    image = torch.arange(images).repeat_interleave(128)[:, None]
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    features = features.to(device, dtype, memory_format=layout)
    return features, torch.cat([image, boxes], dim=1).to(device)


def torchvision_roi_pool(features: Tensor, rois: Tensor) -> Tensor:
    """torchvision's operator, which does not support bf16: features are upcast, as autocast does."""
    return torchvision.ops.roi_pool(features.float(), rois, 7, SCALE).to(features.dtype)


def describe(features: Tensor, rois: Tensor) -> str:
    return f"{len(rois)} RoIs of {'x'.join(map(str, features.shape))} to 7x7"


def floor(features: Tensor, rois: Tensor) -> tuple[roofline.Work]:
    return roofline.roi_pool(features.numel(), len(rois) * features.shape[1] * 49, features.element_size())


@sizes
def test_forward(compare, device, images, dtype):
    features, rois = training_inputs(images, dtype, device)
    ours = lambda: ops.roi_pool(features, rois, 7, SCALE)  # noqa: E731
    planes = features.contiguous()  # as torchvision has it
    theirs = lambda: torchvision_roi_pool(planes, rois)  # noqa: E731
    assert torch.equal(ours(), theirs())
    compare(
        ours,
        theirs,
        op="roi_pool",
        size=describe(features, rois),
        dtype=str(dtype).removeprefix("torch."),
        floor=floor(features, rois),
        graph=True,
    )


@sizes
def test_forward_and_backward(compare, device, images, dtype):
    features, rois = training_inputs(images, dtype, device)
    planes = features.contiguous().clone().requires_grad_()  # as torchvision has it
    features.requires_grad_()
    grad = torch.randn(len(rois), 512, 7, 7, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def ours() -> Tensor:
        return torch.autograd.grad(ops.roi_pool(features, rois, 7, SCALE), features, grad)[0]

    def theirs() -> Tensor:
        return torch.autograd.grad(torchvision_roi_pool(planes, rois), planes, grad)[0]

    if device.type == "cpu":  # on a GPU torchvision adds in no fixed order
        assert torch.equal(ours(), theirs())
    compare(
        ours,
        theirs,
        op="roi_pool with gradient",
        size=describe(features, rois),
        dtype=str(dtype).removeprefix("torch."),
        floor=floor(features, rois) * 2,
        graph=True,
    )
