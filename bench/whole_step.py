"""The whole step of the detector in every way there is to run it, and of torchvision's with the same networks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from costs import Step
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import fastdet
from fastdet.graphs import GraphedDetector, GraphedTrainer

CLASSES = 21
BOXES = 8


class Case(NamedTuple):
    """What is run: a backbone over `batch` images of height x width pixels, in training or not, in a dtype."""

    name: str
    height: int
    width: int
    batch: int
    training: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def numbers(self) -> dict[str, Any]:
        return {"min_size": self.height, "max_size": max(self.height, self.width)}

    @property
    def trainable(self) -> int | None:
        """The blocks that train: of VGG16 all but the first two, as in the paper, else all."""
        return 3 if self.name == "vgg16" else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def optimizer(self, model: nn.Module, lr: float | Tensor = 1e-3) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A learning rate that is a tensor is for a graph, which takes nothing but fused ones on any device.
        fused = self.device.type == "cuda" or isinstance(lr, Tensor)
        return torch.optim.SGD(trained, lr=lr, momentum=0.9, fused=fused)


class RoIMaxPool(MultiScaleRoIAlign):
    """torchvision's place for RoI pooling, filled with its RoI max-pool over one level."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        # In fp32 as under autocast on a GPU: on a CPU it knows no bf16.
        return torchvision.ops.roi_pool(x["0"].float(), [each.float() for each in boxes], self.output_size, 1 / 16)


def our_model(case: Case) -> fastdet.FasterRCNN:
    """As many hidden channels in the RPN as torchvision's has, which is as many as the features have."""
    with case.device:
        model = fastdet.FasterRCNN(
            case.name,
            CLASSES,
            trainable_backbone_layers=case.trainable,
            rpn_hidden_channels=None,
            size_divisible=1,
            **case.numbers,
        )
    return model.train(case.training)


def their_model(case: Case) -> nn.Module:
    """torchvision's FasterRCNN with the numbers of the VGG16 detector, as far as it has them."""
    with case.device:
        backbone, head = fastdet.backbones.build(case.name, trainable_layers=case.trainable)
        if head is None:
            head = TwoMLPHead(backbone.out_channels * 49, 1024)
        anchors = torchvision.models.detection.rpn.AnchorGenerator(((128, 256, 512),), ((0.5, 1.0, 2.0),))
        model = torchvision.models.detection.FasterRCNN(
            backbone,
            size_divisible=1,
            rpn_anchor_generator=anchors,
            box_roi_pool=RoIMaxPool(["0"], 7, 2),
            box_head=head,
            box_predictor=FastRCNNPredictor(head.fc7.out_features, CLASSES),
            rpn_pre_nms_top_n_train=12000,
            rpn_pre_nms_top_n_test=6000,
            rpn_post_nms_top_n_train=2000,
            rpn_post_nms_top_n_test=300,
            box_batch_size_per_image=128,
            box_nms_thresh=0.3,
            box_detections_per_img=6000,
            **case.numbers,
        )
    return model.train(case.training)


def scene(case: Case) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images on the device; targets on the host, as a data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, case.height, case.width, generator=generator) for _ in range(case.batch)]
    side = torch.tensor([case.width, case.height])
    corner = torch.rand(case.batch, BOXES, 2, generator=generator) * side * 0.6
    extent = 30 + torch.rand(case.batch, BOXES, 2, generator=generator) * side * 0.3
    boxes = torch.cat([corner, corner + extent], dim=2)
    return [image.to(case.device) for image in images], [
        {"boxes": box, "labels": torch.arange(1, BOXES + 1)} for box in boxes
    ]


def eager(case: Case) -> Step:
    """The model's call, and torch's own loop."""
    return _called(case, our_model(case))


def compiled(case: Case) -> Step:
    """The same through torch.compile."""
    model = our_model(case)
    torch._dynamo.reset()
    model.core = torch.compile(model.core, fullgraph=True)  # type: ignore[method-assign]
    return _called(case, model)


def graphed(case: Case) -> Step:
    """As one CUDA graph; on a CPU its eager stand-in."""
    model = our_model(case)
    images, targets = scene(case)
    batch, padded, _ = model._open(images, targets, True)
    shape = case.batch, 3, case.height, case.width
    amp = None if case.dtype == torch.float32 else case.dtype
    if not case.training:
        detector = GraphedDetector(model, shape, amp=amp)
        return Step(partial(detector, images), partial(detector.padded, *batch), model, None)
    assert padded is not None
    optimizer = case.optimizer(model, lr=torch.tensor(1e-3))
    trainer = GraphedTrainer(model, optimizer, shape, BOXES, amp=amp)
    return Step(
        partial(trainer.step, images, targets),
        partial(trainer.step_padded, batch.images, batch.sizes, padded, batch.scales),
        model,
        optimizer,
    )


def torchvisions(case: Case) -> Step:
    model = their_model(case)
    images, targets = scene(case)
    there = [{name: value.to(case.device) for name, value in target.items()} for target in targets]
    call = partial(model, images, there if case.training else None)
    return _looped(case, model, call, call)


WAYS: dict[str, Callable[[Case], Step]] = {"eager": eager, "compiled": compiled, "graphed": graphed}


def _called(case: Case, model: fastdet.FasterRCNN) -> Step:
    images, targets = scene(case)
    batch, padded, _ = model._open(images, targets, True)
    given = (targets, padded) if case.training else (None, None)
    return _looped(
        case,
        model,
        lambda: model(images, given[0]),
        # As the model calls it, so that nothing is compiled twice.
        lambda: model.core(
            batch.images,
            batch.sizes,
            given[1],
            batch.scales,
            want_losses=case.training,
            want_detections=not case.training,
        )[0],
    )


def _looped(case: Case, model: nn.Module, call: Callable[[], Any], padded: Callable[[], Any]) -> Step:
    """The loop around calls that give losses in training, and else detections."""
    optimizer = case.optimizer(model) if case.training else None

    def once(call: Callable[[], Any]) -> None:
        if optimizer is None:
            with torch.inference_mode(), case.autocast():
                call()
            return
        optimizer.zero_grad()
        with case.autocast():
            loss = sum(call().values())
        loss.backward()
        optimizer.step()

    return Step(partial(once, call), partial(once, padded), model, optimizer)
