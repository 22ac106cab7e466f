"""Under `torch.use_deterministic_algorithms(True)` no operator raises, and two runs of one seed give the same bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdet import FasterRCNN
from tests.helpers.detectors import NUM_CLASSES, small_detector, small_scene

STEPS = 20


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """An operator without a deterministic form raises here, where elsewhere it warns."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pyramid() -> FasterRCNN:
    torch.manual_seed(0)
    settings = {"rpn_post_nms_top_n_train": 30, "box_batch_size_per_image": 16, "box_representation_size": 16}
    return FasterRCNN("mobilenet_v2_fpn", NUM_CLASSES, min_size=64, max_size=96, **settings)


def trained(model: FasterRCNN, device: torch.device, seed: int, steps: int = STEPS) -> dict[str, Tensor]:
    """The state after some steps."""
    model.to(device).train()
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, targets = small_scene()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("build", [small_detector, pyramid])
def test_two_runs_end_in_the_same_bits(build, device):
    first, second = (trained(build(), torch.device(device), seed=1) for _ in range(2))
    assert all(value.isfinite().all() for value in first.values())
    assert differing(first, second) == []


def test_another_seed_ends_in_others():
    first, second = (trained(small_detector(), torch.device("cpu"), seed, steps=2) for seed in (1, 2))
    assert differing(first, second)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    return [name for name, value in first.items() if not torch.equal(value, second[name])]
