"""The whole step of the detector in every way there is to run it, and of torchvision's with the same weights."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import fastdet
from bench.costs import Step
from fastdet.graphs import GraphedDetector, GraphedTrainer

CLASSES = 21
BOXES = 8
# A class score of the random weights is about N(0, 1); so much more for the background leaves some hundred detections.
BACKGROUND = 4.0


class Case(NamedTuple):
    """What is run: a backbone over `batch` images of height x width pixels, in training or not, in a dtype.

    A rate of 0 leaves the weights, and with them the work, as they are.
    """

    name: str
    height: int
    width: int
    batch: int
    training: bool
    dtype: torch.dtype
    device: torch.device
    lr: float = 0.0

    @property
    def size_settings(self) -> dict[str, Any]:
        return {"min_size": self.height, "max_size": max(self.height, self.width)}

    @property
    def trainable(self) -> int | None:
        """How many blocks train: of VGG16 all but the first two, as in the paper, else all."""
        return 3 if self.name == "vgg16" else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def optimizer(self, model: nn.Module, graphed: bool = False) -> torch.optim.Optimizer | None:
        """Fused for all, as a graph requires; there the learning rate is a tensor. None where nothing trains."""
        if not self.training:
            return None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, torch.tensor(self.lr) if graphed else self.lr, momentum=0.9, fused=True)


class RoIMaxPool(MultiScaleRoIAlign):
    """torchvision's module for RoI pooling, with its RoI max-pool over one level."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        # In fp32 as under autocast on a GPU: on a CPU it does not support bf16.
        return torchvision.ops.roi_pool(x["0"].float(), [each.float() for each in boxes], self.output_size, 1 / 16)


def build_fastdet(case: Case) -> fastdet.FasterRCNN:
    """With random weights that give detections. The RPN has as many hidden channels as torchvision's."""
    torch.manual_seed(0)
    with case.device:
        model = fastdet.FasterRCNN(
            case.name,
            CLASSES,
            trainable_backbone_layers=case.trainable,
            rpn_hidden_channels=None,
            size_divisible=1,
            **case.size_settings,
        )
    with torch.no_grad():
        inspected = model.eval().inspect(scene(case._replace(batch=1))[0])
        predictor = model.roi_heads.box_predictor.cls_score
        predictor.weight /= inspected["class_logits"].std()
        predictor.bias[0] = BACKGROUND
    return model.train(case.training)


def build_torchvision(case: Case, ours: fastdet.FasterRCNN) -> nn.Module:
    """torchvision's FasterRCNN as torchvision builds it, with the weights and the settings of `ours`."""
    settings = ours.settings
    with case.device:
        backbone, head = fastdet.models.backbones.build(case.name, trainable_layers=case.trainable)
        if head is None:
            head = TwoMLPHead(backbone.out_channels * 49, settings.box_representation_size)
        anchors = torchvision.models.detection.rpn.AnchorGenerator(((128, 256, 512),), ((0.5, 1.0, 2.0),))
        model = torchvision.models.detection.FasterRCNN(
            backbone,
            size_divisible=1,
            rpn_anchor_generator=anchors,
            box_roi_pool=RoIMaxPool(["0"], 7, 2),
            box_head=head,
            box_predictor=FastRCNNPredictor(head.fc7.out_features, CLASSES),
            **{
                name: getattr(settings, name)
                for name in (
                    "rpn_pre_nms_top_n_train",
                    "rpn_pre_nms_top_n_test",
                    "rpn_post_nms_top_n_train",
                    "rpn_post_nms_top_n_test",
                    "rpn_fg_iou_thresh",
                    "rpn_bg_iou_thresh",
                    "rpn_batch_size_per_image",
                    "box_batch_size_per_image",
                    "box_score_thresh",
                    "box_nms_thresh",
                )
            },
            # As many as there can be.
            box_detections_per_img=settings.rpn_post_nms_top_n_test * (CLASSES - 1),
            **case.size_settings,
        )
    weights = ours.state_dict()
    for kind in ("weight", "bias"):
        # One logit an anchor in the place of two: the object's less the background's.
        both = weights[f"rpn.head.cls_logits.{kind}"].unflatten(0, (-1, 2))
        weights[f"rpn.head.cls_logits.{kind}"] = both[:, 1] - both[:, 0]
    model.load_state_dict(weights)
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
    """The model's call in an eager loop."""
    return _call_step(case, build_fastdet(case))


def fused(case: Case) -> Step:
    """The same of the fused model; only in inference."""
    return _call_step(case, fastdet.fuse(build_fastdet(case)))


def compiled(case: Case) -> Step:
    """The same through torch.compile."""
    return _call_step(case, _compile(build_fastdet(case)))._replace(in_operators=False)


def graphed(case: Case) -> Step:
    """As one CUDA graph; on a CPU its eager stand-in."""
    return _graph_step(case, build_fastdet(case))


def graphed_compiled(case: Case) -> Step:
    """As one CUDA graph of the compiled step."""
    return _graph_step(case, _compile(build_fastdet(case)))


def _compile(model: fastdet.FasterRCNN) -> fastdet.FasterRCNN:
    torch._dynamo.reset()
    model.compile(fullgraph=True)
    return model


def _graph_step(case: Case, model: fastdet.FasterRCNN) -> Step:
    images, targets = scene(case)
    batch, padded, _ = model.preprocess(images, targets)
    shape = case.batch, 3, case.height, case.width
    amp = None if case.dtype == torch.float32 else case.dtype
    optimizer = case.optimizer(model, graphed=True)
    if optimizer is None:
        detector = GraphedDetector(model, shape, amp=amp)
        return Step(
            partial(detector, images),
            partial(detector.padded, *batch),
            model,
            None,
            in_operators=False,
            other_bytes=lambda: detector.nbytes,
        )
    # The loops of the others compute no norm of gradients either.
    trainer = GraphedTrainer(model, optimizer, shape, BOXES, amp=amp, check_gradients=False)
    return Step(
        partial(trainer.step, images, targets),
        partial(trainer.step_padded, batch.images, batch.sizes, padded, batch.scales),
        model,
        optimizer,
        in_operators=False,
        other_bytes=lambda: trainer.nbytes,
    )


def torchvision_step(case: Case) -> Step:
    """torchvision's detector. Its targets lie on the device beforehand: nothing checks or copies them."""
    model = build_torchvision(case, build_fastdet(case))
    images, targets = scene(case)
    on_device = [{name: value.to(case.device) for name, value in target.items()} for target in targets]
    given_targets = on_device if case.training else None
    batch, resized = model.transform(images, given_targets)

    def without_transform() -> Any:
        features = OrderedDict([("0", model.backbone(batch.tensors))])
        proposals, rpn_losses = model.rpn(batch, features, resized)
        found, box_losses = model.roi_heads(features, proposals, batch.image_sizes, resized)
        return {**rpn_losses, **box_losses} if case.training else found

    return _loop_step(case, model, partial(model, images, given_targets), without_transform)


WAYS: dict[str, Callable[[Case], Step]] = {
    "eager": eager,
    "fused": fused,
    "compiled": compiled,
    "graphed": graphed,
    "graphed, compiled": graphed_compiled,
}


def _call_step(case: Case, model: fastdet.FasterRCNN) -> Step:
    images, targets = scene(case)
    batch, padded, _ = model.preprocess(images, targets)
    given_targets, given_padded = (targets, padded) if case.training else (None, None)

    def forward_padded() -> Any:
        # As the model calls it, so that nothing is compiled twice.
        losses, found = model.forward_padded(
            batch.images,
            batch.sizes,
            given_padded,
            batch.scales,
            compute_losses=case.training,
            compute_detections=not case.training,
        )
        return losses if case.training else found

    return _loop_step(case, model, lambda: model(images, given_targets), forward_padded)


def _loop_step(case: Case, model: nn.Module, call: Callable[[], Any], padded: Callable[[], Any]) -> Step:
    """The loop around calls that give losses in training and detections otherwise; the latter are returned."""
    optimizer = case.optimizer(model)

    def run_once(call: Callable[[], Any]) -> Any:
        if optimizer is None:
            with torch.inference_mode(), case.autocast():
                return call()
        optimizer.zero_grad()
        with case.autocast():
            loss = sum(call().values())
        loss.backward()
        optimizer.step()
        return None

    return Step(partial(run_once, call), partial(run_once, padded), model, optimizer)
