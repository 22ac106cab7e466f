"""On a GPU no operation and no step of the detector has a host sync, and inference is one graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bench.calls import CALLS, OpCall
from fastdet import Detections, FasterRCNN, Targets, ops
from fastdet.ops.nms import nms_padded
from tests.helpers.checks import random_boxes

pytestmark = pytest.mark.cuda

BACKBONES = ["mobilenet_v2", "mobilenet_v2_fpn"]
BATCH, HEIGHT, WIDTH = 2, 320, 480


@pytest.fixture
def _poisoned_memory() -> None:
    """The operators that the detector runs with, not their deterministic stand-ins."""


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """An operator of torch that has a host sync raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def twice_without_host_sync(call: Callable[[], object]) -> None:
    """The first call may synchronize: it compiles kernels and opens libraries."""
    call()
    with no_host_sync():
        for _ in range(2):
            call()
    torch.cuda.synchronize()


def detector(backbone: str, device: torch.device) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(backbone, 5, box_representation_size=64).to(device)


def padded_inputs(device: torch.device) -> tuple[Tensor, Tensor, Targets, Tensor]:
    """Images of two sizes, and ground truth of which one box is padding and one is ignored."""
    images = torch.rand(BATCH, 3, HEIGHT, WIDTH)
    sizes = torch.tensor([[HEIGHT, WIDTH], [HEIGHT - 30, WIDTH - 70]])
    boxes = random_boxes(BATCH, 6, side=float(HEIGHT))
    labels, ignore = torch.randint(1, 5, (BATCH, 6)), torch.zeros(BATCH, 6, dtype=torch.bool)
    labels[0, 5], ignore[1, 0] = 0, True
    targets = Targets(boxes.to(device), labels.to(device), ignore.to(device))
    return images.to(device), sizes.to(device), targets, torch.tensor([1.0, 0.5]).to(device)


def detections(model: FasterRCNN, images: Tensor, sizes: Tensor, scales: Tensor) -> Detections:
    found = model.forward_padded(images, sizes, None, scales)[1]
    assert found is not None
    return found


def test_the_mode_catches_a_host_sync(gpu: torch.device) -> None:
    ones = torch.ones(3, device=gpu)
    for sync in (lambda: ones.sum().item(), ones.nonzero, ones.tolist, ones.cpu, lambda: torch.ones(3).to(gpu)):
        with no_host_sync(), pytest.raises(RuntimeError, match="synchroniz"):
            sync()


@pytest.mark.parametrize("build", CALLS, ids=lambda build: build.__name__)
def test_operations(gpu: torch.device, build: Callable[[torch.device, bool], OpCall]) -> None:
    twice_without_host_sync(build(gpu, False).run)


def test_padded_forms(gpu: torch.device) -> None:
    boxes, scores = random_boxes(BATCH, 200).to(gpu), torch.rand(BATCH, 200).to(gpu)
    valid = (torch.rand(BATCH, 200) < 0.8).to(gpu)
    levels = [torch.rand(BATCH, 16, side, side).to(gpu).requires_grad_() for side in (32, 16)]

    def gradients(pooled: Tensor) -> None:
        torch.autograd.grad(pooled.sum(), levels, allow_unused=True)

    def every() -> None:
        nms_padded(boxes, scores, 0.5, 50, valid)
        ops.match(boxes, boxes[:, :9], valid[:, :9], high=0.7, low=0.3, valid=valid, gt_ignore=valid[:, 9:18])
        ops.sample(valid.long(), 64, 16)
        gradients(ops.batched_roi_pool(levels[1], boxes, 3, 1 / 8, valid))
        gradients(ops.batched_roi_align(levels, boxes, 3, [1 / 4, 1 / 8], 2, False, valid))

    twice_without_host_sync(every)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_step(gpu: torch.device, backbone: str) -> None:
    model = detector(backbone, gpu).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs = padded_inputs(gpu)

    def step() -> None:
        losses, _ = model.forward_padded(*inputs)
        assert losses is not None
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    twice_without_host_sync(step)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_inference(gpu: torch.device, backbone: str) -> None:
    model = detector(backbone, gpu).eval()
    images, sizes, _, scales = padded_inputs(gpu)
    with torch.no_grad():
        twice_without_host_sync(lambda: detections(model, images, sizes, scales))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_inference_is_one_cuda_graph(gpu: torch.device, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = detector(backbone, gpu).eval()
    images, sizes, _, scales = padded_inputs(gpu)
    others = torch.rand_like(images)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        expected = [detections(model, content, sizes, scales) for content in (others, images)]
        assert not torch.equal(expected[0].boxes, expected[1].boxes), "the case gives the same for both inputs"
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            detections(model, images, sizes, scales)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = detections(model, images, sizes, scales)
        for content, eager in zip((others, images.clone()), expected, strict=True):
            images.copy_(content)
            graph.replay()
            torch.cuda.synchronize()
            assert int(eager.count.sum()) > 0, "the case finds nothing"
            for name, actual, wanted in zip(eager._fields, found, eager, strict=True):
                assert torch.equal(actual, wanted), name
