"""Under autocast the convolutions, the box head and pooling run in low precision, and everything on boxes in fp32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdet
from fastdet import AnchorGenerator, FasterRCNN, ops

SIZE, BATCH, STEPS = 64, 4, 50


def detector() -> FasterRCNN:
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((12, 20, 32),), offset=4.0)
    settings = {"min_size": SIZE, "max_size": SIZE, "rpn_anchor_generator": anchors, "box_representation_size": 64}
    return FasterRCNN("small", 5, **settings).train()


def batches() -> list[tuple[list[Tensor], list[dict[str, Any]]]]:
    shapes = fastdet.data.Shapes(5 * BATCH, size=SIZE)
    loader = torch.utils.data.DataLoader(shapes, batch_size=BATCH, collate_fn=fastdet.data.collate)
    return list(loader)


def losses_of_training(dtype: torch.dtype) -> Tensor:
    """The loss of each of STEPS steps."""
    model, data, found = detector(), batches(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        images, targets = data[step % len(data)]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = sum(model(images, targets).values())
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def test_bf16_follows_fp32():
    """Step for step at first; later, as samples and proposals are chosen otherwise, in the mean of a pass."""
    full, low = losses_of_training(torch.float32), losses_of_training(torch.bfloat16)
    assert full[-5:].mean() < 0.7 * full[:5].mean(), "the case learns nothing"
    assert not torch.equal(full, low), "nothing ran in bf16"
    torch.testing.assert_close(low[:5], full[:5], rtol=0.02, atol=0)
    torch.testing.assert_close(low.unflatten(0, (-1, 5)).mean(1), full.unflatten(0, (-1, 5)).mean(1), rtol=0.1, atol=0)


class Dtypes(TorchDispatchMode):
    """The floating-point types that each operation of ours, and each convolution and linear layer, is given."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastdet" or name in ("convolution", "addmm", "smooth_l1_loss", "_log_softmax"):
            tensors = [arg for arg in torch.utils._pytree.tree_leaves(args) if isinstance(arg, Tensor)]
            self.recorded.setdefault(name, set()).update(t.dtype for t in tensors if t.is_floating_point())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pooling", ["max", "align"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_step_runs_in_its_precision(dtype, pooling):
    model, (images, targets) = detector(), batches()[0]
    model.settings = model.settings.override(box_pooling=pooling)
    with Dtypes() as dtypes, torch.autocast("cpu", dtype=dtype):
        losses, detections = model(images, targets, return_losses=True)
    low, full, recorded = {dtype}, {torch.float32}, dtypes.recorded
    for name in ("convolution", "addmm"):
        assert recorded[name] == low, name
    # Boxes stay in fp32 beside features in low precision; the outputs of the head are widened as they are read.
    assert recorded["roi_pool" if pooling == "max" else "roi_align"] == low | full
    assert recorded["decode"] == low | full
    for name in ("match", "nms", "smooth_l1_loss", "_log_softmax"):
        assert recorded[name] == full, name
    assert {loss.dtype for loss in losses.values()} == full
    assert {found[key].dtype for found in detections for key in ("boxes", "scores")} == full
    sum(losses.values()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_in_low_precision_takes_boxes_in_fp32(dtype):
    features, boxes = torch.rand(1, 4, 300, 300), torch.tensor([[0.0, 257.3, 131.7, 290.2, 270.9]])
    low = ops.roi_pool(features.to(dtype), boxes, 7)
    assert torch.equal(low, ops.roi_pool(features.to(dtype).float(), boxes, 7).to(dtype))
