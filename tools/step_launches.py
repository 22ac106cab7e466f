"""`python -m tools.step_launches`: how many kernels one training step of VGG16 launches, by operation, without a GPU.

A step runs on the CPU: one image of 600 x 901 pixels, the hyperparameters of VGG16, and few channels, as their number
does not matter here. Each operation of fastdet is called twice: as implemented for CUDA, where the launches are caught
and nothing runs, and as implemented for the CPU.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdet import VGG16, FasterRCNN
from fastdet.ops.decode import decode_cuda
from fastdet.ops.match import match_cuda
from fastdet.ops.nms import nms_cuda
from fastdet.ops.roi_pool import roi_pool_backward_cuda, roi_pool_cuda
from fastdet.ops.sample import sample_cuda
from fastdet.structures import Targets
from tools.launches import record_launches

# Those that a training step of VGG16 calls, in its order.
CUDA: dict[str, Callable[..., Any]] = {
    "match": match_cuda,
    "sample": sample_cuda,
    "decode": decode_cuda,
    "nms": nms_cuda,
    "roi_pool": roi_pool_cuda,
    "roi_pool_backward": roi_pool_backward_cuda,
}
HEIGHT, WIDTH, STRIDE, CHANNELS, CLASSES, BOXES = 600, 901, 16, 16, 21, 8


class CountLaunches(TorchDispatchMode):
    """Counts in `launches`, by operation, what fastdet's operations would launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fastdet":
            with record_launches() as launches:
                CUDA[name](*args, **(kwargs or {}))
            self.launches[name] += len(launches)
        return func(*args, **(kwargs or {}))


def training_step() -> dict[str, int]:
    """Launches by operation."""
    torch.manual_seed(0)
    backbone: Any = nn.Conv2d(3, CHANNELS, STRIDE, STRIDE)
    backbone.out_channels = CHANNELS
    model = FasterRCNN(
        backbone, CLASSES, settings=VGG16, rpn_hidden_channels=CHANNELS, box_representation_size=CHANNELS
    )
    corner = torch.rand(1, BOXES, 2) * torch.tensor([WIDTH, HEIGHT]) * 0.6
    labels = torch.arange(1, BOXES + 1)[None]
    targets = Targets(torch.cat([corner, corner + 150], dim=2), labels, torch.zeros_like(labels, dtype=torch.bool))
    with CountLaunches() as count:
        losses, _ = model.forward_padded(torch.rand(1, 3, HEIGHT, WIDTH), torch.tensor([[HEIGHT, WIDTH]]), targets)
        assert losses is not None
        torch.stack(list(losses.values())).sum().backward()
    return {name: count.launches[name] for name in CUDA}


if __name__ == "__main__":
    by_operation = training_step()
    for name, launches in by_operation.items():
        print(f"{name:<18} {launches:>3}")
    print(f"{'all':<18} {sum(by_operation.values()):>3}")
