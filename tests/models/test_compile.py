"""torch.compile takes the whole step as one graph, and few graphs serve every batch size."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdet import AnchorGenerator, FasterRCNN, Targets
from tests.helpers.checks import random_boxes
from tests.helpers.detectors import NUM_CLASSES, PYRAMID_SETTINGS, Pyramid, small_detector, small_scene

HEIGHT, WIDTH = 64, 96


def padded(batch: int) -> tuple[Tensor, Tensor, Targets, Tensor]:
    """Random images of one padded size, and three boxes for each."""
    boxes, labels = random_boxes(batch, 3, side=float(HEIGHT)), torch.randint(1, NUM_CLASSES, (batch, 3))
    sizes = torch.tensor([[HEIGHT, WIDTH]] * batch)
    targets = Targets(boxes, labels, torch.zeros(batch, 3, dtype=torch.bool))
    return torch.rand(batch, 3, HEIGHT, WIDTH), sizes, targets, torch.ones(batch)


def pyramid() -> FasterRCNN:
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16, 24), (32, 48), (64, 96)))
    settings = {**PYRAMID_SETTINGS, "box_batch_size_per_image": 16, "box_representation_size": 16}
    return FasterRCNN(Pyramid(), NUM_CLASSES, rpn_anchor_generator=anchors, box_featmap_names=("0", "1"), **settings)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("build", [small_detector, pyramid])
def test_two_graphs_serve_batches_of_one_to_eight(build, training):
    model = build().train(training)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward_padded, fullgraph=True, backend=counter)
    for batch in (1, 2, 5, 8):
        images, sizes, targets, scales = padded(batch)
        with torch.set_grad_enabled(training):
            torch.manual_seed(batch)
            losses, detections = compiled(images, sizes, targets if training else None, scales)
            torch.manual_seed(batch)
            expected_losses, expected = model.forward_padded(images, sizes, targets if training else None, scales)
        if training:
            sum(losses.values()).backward()
            torch.testing.assert_close(losses, expected_losses)
        else:
            torch.testing.assert_close(tuple(detections), tuple(expected))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_compiled_step_serves_the_models_call(training):
    model = small_detector().train(training)
    images, targets = small_scene()
    torch.manual_seed(2)
    expected = model(images, targets if training else None)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=counter)
    torch.manual_seed(2)
    torch.testing.assert_close(model(images, targets if training else None), expected)
    assert counter.frame_count == 1
    detections = model.eval()(images)
    with_features = model(images, return_features=True, return_class_scores=True)
    assert counter.frame_count == 3 - (not training), "each set of outputs is a graph"
    for found, expected in zip(with_features, detections, strict=True):
        torch.testing.assert_close(found["boxes"], expected["boxes"])
        assert found["features"].shape == (len(found["boxes"]), 16)
        torch.testing.assert_close(found["class_scores"].amax(1) >= found["scores"] - 1e-5, found["scores"] > 0)


def test_a_copy_of_a_compiled_model_runs_with_the_copied_weights():
    model = small_detector().eval()
    images, _ = small_scene()
    expected = model(images)
    model.compile(backend="eager", fullgraph=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for found, original in zip(copied(images), expected, strict=True):
            assert torch.equal(found["scores"], original["scores"])
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert {score for each in copied(images) for score in each["scores"].tolist()} == {0.25}
        assert copied.compiled_step is None
    assert model.compiled_step is not None, "the original stays compiled"


def test_compiling_serves_padded_tensors_and_replicas():
    model = small_detector().eval()
    batch, _, _ = model.preprocess(small_scene()[0])
    expected = model.forward_padded(*batch[:2], None, batch.scales)[1]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile(fullgraph=True, backend=counter)
    found = model.forward_padded(*batch[:2], None, batch.scales)[1]
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected)
    replica = model._replicate_for_data_parallel()
    replica._modules = {**model._modules, "rpn": copy.deepcopy(model.rpn)}
    with torch.no_grad():
        for parameter in replica.rpn.parameters():
            parameter.zero_()
    assert not torch.equal(replica.forward_padded(*batch[:2], None, batch.scales)[1].boxes, expected.boxes)
