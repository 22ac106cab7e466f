"""Weights of untrained detectors with which every step decides something: as initialized every box scores alike."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def randomize_heads(model: nn.Module, std: float | Callable[[str, Tensor], float] = 0.3) -> None:
    """Draw the weights of the RPN's head and of the box predictor from N(0, std); `std(name, weight)` if callable."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and ("rpn.head" in name or "predictor" in name):
            nn.init.normal_(parameter, std=std(name, parameter) if callable(std) else std)


def calibrate_batchnorm(model: nn.Module, forward: Callable[[], object]) -> None:
    """Set the statistics of BatchNorm to those of one pass: else the features of fifty layers are noise or huge."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        forward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=1e-2)


def rescale_heads(model: nn.Module, images: list[Tensor]) -> None:
    """Scale the layers of the heads so that their outputs deviate by 1 on these images, and box deltas by a quarter."""

    def rescale(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        factor = deviations[layer] / output.std()
        layer.weight.mul_(factor)
        return output * factor

    deviations = {
        layer: 0.25 if name == "rpn.head.bbox_pred" else 1.0
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and ("rpn.head" in name or "roi_heads" in name)
    }
    handles = [layer.register_forward_hook(rescale) for layer in deviations]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
