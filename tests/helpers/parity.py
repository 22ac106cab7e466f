"""The comparison of a detector with torchvision's of the same weights: losses, gradients, detections."""

from typing import Any

import torch
from torch import Tensor, nn

Targets = list[dict[str, Tensor]]

# With quotas this large every candidate is sampled, so that nothing is random.
EVERYTHING: dict[str, Any] = {
    "rpn_batch_size_per_image": 20_000,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 2500,
    "box_positive_fraction": 1.0,
}


def sample_all_candidates(theirs: nn.Module) -> None:
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 200_000, 1.0


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
    """The same count, and each detection beside one of its label, boxes within `pixels`, scores within `scores`; no
    fewer than `at_least` in all. Of scores that are so close another may rank first."""
    assert sum(len(each["boxes"]) for each in expected) >= at_least
    for theirs, ours in zip(expected, found, strict=True):
        assert len(theirs["boxes"]) == len(ours["boxes"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=scores)
        same = theirs["labels"][:, None] == ours["labels"]
        same &= (theirs["boxes"][:, None] - ours["boxes"]).abs().amax(-1) <= pixels
        same &= (theirs["scores"][:, None] - ours["scores"]).abs() <= scores
        alone = [side.nonzero()[:, 0].tolist() for side in (~same.any(1), ~same.any(0))]
        assert alone == [[], []], f"torchvision's without ours, and ours without torchvision's: {alone}"


def assert_same_losses(expected: dict[str, Tensor], found: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert set(expected) == set(found)
    for name in expected:
        assert abs(found[name] - expected[name]) <= relative * expected[name].abs() + 1e-6, name


def assert_same_gradients(theirs: nn.Module, ours: nn.Module, relative: float = 1e-3) -> None:
    """To within `relative` times the largest gradient of each parameter."""
    for (name, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert expected.requires_grad == found.requires_grad, name
        if expected.requires_grad:
            largest = expected.grad.abs().max()
            assert largest > 0, name
            assert (expected.grad - found.grad).abs().max() < relative * largest, name
