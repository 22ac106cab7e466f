"""torchvision's detector accelerated and as built: the whole step, and the methods that are replaced."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from fastdet.interop.accelerate import accelerate

CLASSES = 91
HEIGHT, WIDTH = 800, 1216
LEVELS = [(200, 304), (100, 152), (50, 76), (25, 38), (13, 19)]


def built(name: str, height: int, width: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The accelerated model and torchvision's, with the same weights."""
    torch.manual_seed(0)
    sizes = {"min_size": height, "max_size": max(height, width)}
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **sizes).to(device)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    return ours, theirs


def boxes(generator: torch.Generator, count: int, height: int, width: int) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7])
    side = 8 + torch.rand(count, 2, generator=generator) ** 2 * torch.tensor([width * 0.3, height * 0.3])
    return torch.cat([corner, corner + side], dim=1)


def scene(batch: int, height: int, width: int, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator).to(device) for _ in range(batch)]
    labels = torch.arange(1, 9, device=device)
    return images, [{"boxes": boxes(generator, 8, height, width).to(device), "labels": labels} for _ in range(batch)]


def rounds() -> int:
    return 20 if torch.cuda.is_available() else 3


# On a CPU the small backbone, which finishes.
CASES = [("fasterrcnn_mobilenet_v3_large_fpn", 320, 480, 2)]
if torch.cuda.is_available():
    CASES += [("fasterrcnn_resnet50_fpn", HEIGHT, WIDTH, batch) for batch in (1, 8)]


@pytest.mark.parametrize(("name", "height", "width", "batch"), CASES)
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_step(
    compare: Callable[..., None], device: torch.device, name: str, height: int, width: int, batch: int, mode: str
) -> None:
    images, targets = scene(batch, height, width, device)

    def step(model: nn.Module) -> Callable[[], object]:
        model.train(mode == "train")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def train() -> None:
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()

        def infer() -> object:
            with torch.inference_mode():
                return model(images)

        return train if mode == "train" else infer

    ours, theirs = built(name, height, width, device)
    size = f"{name.removeprefix('fasterrcnn_')} {height}x{width}, {batch}"
    compare(step(ours), step(theirs), op=f"accelerated, {mode}", size=size, rounds=rounds())


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, theirs = built("fasterrcnn_mobilenet_v3_large_fpn", 320, 480, device)
    for model in (ours, theirs):
        sizes = ((32,), (64,), (128,), (256,), (512,))
        anchors = detection.rpn.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        model.rpn.anchor_generator = anchors
        model.rpn._pre_nms_top_n = {"training": 2000, "testing": 1000}
        model.rpn._post_nms_top_n = {"training": 2000, "testing": 1000}
        model.rpn.score_thresh = 0.0
        model.eval()
    accelerate(ours)
    return ours, theirs


def rpn_outputs(model: nn.Module, batch: int, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """The anchors, their deltas and their logits: similar to those of a trained head."""
    generator = torch.Generator().manual_seed(0)
    image = ImageList(torch.empty(batch, 3, HEIGHT, WIDTH, device=device), [(HEIGHT, WIDTH)] * batch)
    anchors = model.rpn.anchor_generator(image, [torch.empty(batch, 1, *grid, device=device) for grid in LEVELS])
    total = batch * len(anchors[0])
    deltas = torch.randn(total, 4, generator=generator) * 0.2
    return anchors, deltas.to(device), torch.randn(total, 1, generator=generator).to(device)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_filter_proposals(
    compare: Callable[..., None], device: torch.device, models: tuple[nn.Module, nn.Module], batch: int, mode: str
) -> None:
    anchors, deltas, logits = rpn_outputs(models[1], batch, device)
    proposals = models[1].rpn.box_coder.decode(deltas, anchors).view(batch, -1, 4)
    counts = [3 * rows * columns for rows, columns in LEVELS]

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            model.rpn.training = mode == "train"
            return model.rpn.filter_proposals(proposals, logits, [(HEIGHT, WIDTH)] * batch, counts)

        return run

    size = f"five levels of {HEIGHT}x{WIDTH}, {mode}, {batch}"
    compare(*map(call, models), op="accelerated, filter_proposals", size=size, rounds=rounds())


def rpn_anchors(model: nn.Module, device: torch.device) -> list[Tensor]:
    image = ImageList(torch.empty(2, 3, HEIGHT, WIDTH, device=device), [(HEIGHT, WIDTH)] * 2)
    return model.rpn.anchor_generator(image, [torch.empty(2, 1, *grid, device=device) for grid in LEVELS])


@pytest.mark.parametrize("num_boxes", [8, 50])
def test_assign_targets_to_anchors(
    compare: Callable[..., None], device: torch.device, models: tuple[nn.Module, nn.Module], num_boxes: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = [{"boxes": boxes(generator, num_boxes, HEIGHT, WIDTH).to(device)} for _ in range(2)]
    anchors = rpn_anchors(models[1], device)
    calls = [lambda rpn=model.rpn: rpn.assign_targets_to_anchors(anchors, targets) for model in models]
    size = f"{HEIGHT}x{WIDTH}, {num_boxes} boxes, 2"
    compare(*calls, op="accelerated, assign_targets (anchors)", size=size, rounds=rounds())


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_postprocess_detections(
    compare: Callable[..., None], device: torch.device, models: tuple[nn.Module, nn.Module], spread: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(1000, CLASSES, generator=generator) * spread).to(device)
    deltas = torch.randn(1000, CLASSES * 4, generator=generator).to(device)
    proposals = [boxes(generator, 1000, HEIGHT, WIDTH).to(device)]
    calls = [
        lambda heads=model.roi_heads: heads.postprocess_detections(logits, deltas, proposals, [(HEIGHT, WIDTH)])
        for model in models
    ]
    compare(
        *calls,
        op="accelerated, postprocess_detections",
        size=f"1000 x {CLASSES}, logits N(0, {spread})",
        rounds=rounds(),
    )


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_box_roi_pool(
    compare: Callable[..., None], device: torch.device, models: tuple[nn.Module, nn.Module], mode: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    proposals = [boxes(generator, 256, HEIGHT, WIDTH).to(device) for _ in range(2)]
    levels = {
        str(number): torch.rand(2, 32, *grid, generator=generator).to(device).requires_grad_(mode != "forward")
        for number, grid in enumerate(LEVELS[:4])
    }

    def call(model: nn.Module) -> Callable[[], object]:
        pool = model.roi_heads.box_roi_pool
        pool.scales = pool.map_levels = None

        def run() -> object:
            pooled = pool(levels, proposals, [(HEIGHT, WIDTH)] * 2)
            return pooled if mode == "forward" else pooled.sum().backward()

        return run

    compare(
        *map(call, models),
        op=f"accelerated, box_roi_pool, {mode}",
        size="512 boxes x 32 channels, 4 levels",
        rounds=rounds(),
    )
