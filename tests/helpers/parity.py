"""What it takes to see that a detector gives torchvision's numbers."""

from typing import Any

import torch
from torch import Tensor, nn

Targets = list[dict[str, Tensor]]

# With quotas this large every candidate trains, and nothing is left to chance.
EVERYTHING: dict[str, Any] = {
    "rpn_batch_size_per_image": 20_000,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 2500,
    "box_positive_fraction": 1.0,
}


def take_all_candidates(theirs: nn.Module) -> None:
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 200_000, 1.0


def strengthen(model: nn.Module, std: float = 0.3) -> None:
    """As initialised every box scores alike; stronger heads make the steps decide something."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and ("rpn.head" in name or "predictor" in name):
            nn.init.normal_(parameter, std=std)


def scene(*sizes: tuple[int, int], classes: int = 5, seed: int = 1) -> tuple[list[Tensor], Targets]:
    """Images of these sizes with four boxes each; the second has none."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    targets = []
    for image in images:
        extent = torch.tensor([image.shape[2], image.shape[1]])
        corner = torch.rand(4, 2, generator=generator) * extent * 0.6
        side = 5 + torch.rand(4, 2, generator=generator) * extent * 0.35
        labels = torch.randint(1, classes, (4,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], dim=1), "labels": labels})
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, targets


def assert_same_detections(
    expected: Targets, found: Targets, *, pixels: float = 1e-3, scores: float = 1e-5, at_least: int = 10
) -> None:
    """The same count and labels, boxes within so many `pixels`, scores within `scores`; and enough to tell."""
    assert sum(len(one["boxes"]) for one in expected) >= at_least
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(other["boxes"], one["boxes"], rtol=0, atol=pixels)
        torch.testing.assert_close(other["scores"], one["scores"], rtol=0, atol=scores)


def assert_same_losses(expected: dict[str, Tensor], found: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert set(expected) == set(found)
    for name in expected:
        assert abs(found[name] - expected[name]) <= relative * expected[name].abs() + 1e-6, name


def assert_same_gradients(theirs: nn.Module, ours: nn.Module, relative: float = 1e-3) -> None:
    """To this part of each parameter's largest one."""
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad, name
        if one.requires_grad:
            size = one.grad.abs().max()
            assert size > 0, name
            assert (one.grad - other.grad).abs().max() < relative * size, name


def calibrate(model: nn.Module, images: list[Tensor]) -> None:
    """Statistics of BatchNorm as after training: untrained, the features of fifty layers would be all noise or huge."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train().backbone(torch.stack([nn.functional.interpolate(x[None], (128, 192))[0] for x in images]))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_(min=1e-2)


def enliven(model: nn.Module, images: list[Tensor]) -> None:
    """Scale the heads until they answer with numbers of about 1, proposals a quarter, so that every step decides."""

    def rescale(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        factor = sizes[layer] / output.std()
        layer.weight.mul_(factor)
        return output * factor

    sizes = {
        layer: 0.25 if name == "rpn.head.bbox_pred" else 1.0
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and ("rpn.head" in name or "roi_heads" in name)
    }
    handles = [layer.register_forward_hook(rescale) for layer in sizes]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
