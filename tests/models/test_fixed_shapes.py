"""The step has no host sync and no shape in it depends on data: batch 2, images of two sizes.

Forward and backward run on the CPU under a mode that refuses operators whose result's shape, or whose host value,
depends on data. That mode cannot see `.tolist()` or copies between devices on a CPU, so the forward runs again on a
fake GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastdet
from fastdet import FasterRCNN, Targets
from tests.helpers.detectors import NUM_CLASSES, SMALL_SETTINGS, TinyBackbone, small_detector, small_scene
from tests.helpers.host_sync import RefuseHostSync


def padded_inputs(model: FasterRCNN) -> tuple[torch.Tensor, torch.Tensor, Targets, torch.Tensor]:
    images, targets = small_scene()
    batch, padded, _ = model.preprocess(images[:2], targets[:2])
    return batch.images, batch.sizes, padded, batch.scales


@pytest.mark.parametrize("pooling", ["max", "align"])
def test_training_step_on_the_cpu(pooling):
    model = small_detector(box_pooling=pooling).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = padded_inputs(model)
    assert len(set(map(tuple, inputs[1].tolist()))) == 2, "two sizes"
    with RefuseHostSync():
        losses, _ = model.forward_padded(*inputs)
        sum(losses.values()).backward()
        optimizer.step()


@pytest.fixture
def as_in_a_graph(monkeypatch):
    """As a graph and a GPU run it: a CPU otherwise looks which classes are found at all."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.usefixtures("as_in_a_graph")
@pytest.mark.parametrize("cap", [None, 5])
def test_inference_step_on_the_cpu(cap):
    model = small_detector(box_detections_per_img=cap).eval()
    images, sizes, _, scales = padded_inputs(model)
    with RefuseHostSync(), torch.no_grad():
        model.forward_padded(images, sizes, None, scales)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [fastdet.VGG16, fastdet.TORCHVISION], ids=["vgg16", "torchvision"])
def test_forward_on_a_fake_gpu(settings, training):
    overrides = {
        **SMALL_SETTINGS,
        "box_featmap_names": None,
        "rpn_hidden_channels": settings.rpn_hidden_channels and 8,
    }
    shapes = [(2, 3, 64, 80), (2, 2), (2, 3, 4), (2, 3), (2,)]
    with FakeTensorMode(), torch.device("cuda"):
        model = FasterRCNN(TinyBackbone(), NUM_CLASSES, settings=settings, **overrides).train(training)
        images, sizes, boxes, labels, scales = (torch.empty(shape) for shape in shapes)
        inputs = images, sizes.long(), Targets(boxes, labels.long(), labels > 0), scales
        with RefuseHostSync():
            losses, detections = model.forward_padded(*inputs, compute_losses=True, compute_detections=True)
        assert losses["loss_classifier"].device.type == "cuda"
        assert detections.boxes.device.type == "cuda"
        assert detections.boxes.ndim == 3


# Everything at once that a pyramid can have.
PYRAMID = {
    "min_size": 64,
    "max_size": 96,
    "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "box_num_convs": 1,
    "class_weights": (1.0, 2.0, 3.0, 4.0),
    "loss_weights": (1.0, 2.0, 3.0, 4.0),
}


@pytest.mark.usefixtures("as_in_a_graph")
@pytest.mark.parametrize("training", [True, False])
def test_a_pyramid_with_all_options_on_the_cpu(training):
    model = FasterRCNN("resnet18_fpn", NUM_CLASSES, **PYRAMID).train(training)
    images, sizes, targets, scales = padded_inputs(model)
    with RefuseHostSync():
        losses, detections = model.forward_padded(
            images, sizes, targets, scales, compute_losses=True, compute_detections=True
        )
        sum(losses.values()).backward()
    assert detections.boxes.shape == (2, 60, 4)


def test_a_pyramid_with_all_options_on_a_fake_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        model = FasterRCNN("resnet18_fpn", NUM_CLASSES, **PYRAMID).train()
        images, sizes, boxes, labels, scales = (
            torch.empty(shape) for shape in [(2, 3, 64, 96), (2, 2), (2, 3, 4), (2, 3), (2,)]
        )
        with RefuseHostSync():
            losses, detections = model.forward_padded(
                images, sizes.long(), Targets(boxes, labels.long(), labels > 0), scales, compute_detections=True
            )
        assert losses["loss_box_reg"].device.type == detections.boxes.device.type == "cuda"


@pytest.mark.parametrize("training", [True, False])
def test_the_step_is_one_graph(training):
    model = small_detector().train(training)
    images, sizes, targets, scales = padded_inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_padded, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    losses, detections = compiled(images, sizes, targets, scales)
    if training:
        sum(losses.values()).backward()
        assert torch.isfinite(model.rpn.head.bbox_pred.weight.grad).all()
    else:
        _, expected = model.forward_padded(images, sizes, None, scales)
        assert torch.equal(detections.labels, expected.labels)
        torch.testing.assert_close(detections.boxes, expected.boxes)


def test_the_modes_detect_each_kind_of_host_sync():
    with RefuseHostSync():
        with pytest.raises(AssertionError, match="nonzero"):
            torch.ones(3).nonzero()
        with pytest.raises(AssertionError, match="boolean mask"):
            torch.ones(3)[torch.ones(3, dtype=torch.bool)]
        with pytest.raises(AssertionError, match="host sync"):
            torch.ones(1).item()
    with FakeTensorMode(), RefuseHostSync():
        tensor = torch.ones(2, device="cuda")
        with pytest.raises(AssertionError, match="copies from cuda"):
            tensor.cpu()
        with pytest.raises(AssertionError, match="copies from cpu"):
            torch.ones(2).to("cuda")
        with pytest.raises((AssertionError, DataDependentOutputException)):
            tensor.tolist()


def test_shapes_do_not_depend_on_the_data():
    """Zeros, noise and NaN give outputs of equal shape, and boxes stay finite."""
    model = small_detector().eval()
    images, sizes, targets, scales = padded_inputs(model)
    shapes = []
    for content in (images, torch.zeros_like(images), torch.full_like(images, torch.nan)):
        losses, detections = model.forward_padded(
            content, sizes, targets, scales, compute_losses=True, compute_detections=True
        )
        shapes.append([tuple(tensor.shape) for tensor in (*losses.values(), *detections)])
        assert torch.isfinite(detections.boxes).all()
    assert shapes[0] == shapes[1] == shapes[2]
    assert int(detections.count.sum()) == 0, "NaN finds nothing"
