"""The detector finds what the model finds."""

import copy
from typing import Any

import pytest
import torch

from fastdet import FasterRCNN
from fastdet.graphs import GraphedDetector
from fastdet.graphs.capture import Program, StaticStep
from tests.helpers.detectors import small_detector, small_scene
from tests.helpers.graphs import FIXED, SHAPE, detector, trainer


@pytest.fixture(scope="module")
def evaluated() -> FasterRCNN:
    return small_detector(**FIXED, box_score_thresh=0.01).eval()


def test_detections_are_those_of_the_model(evaluated):
    images, _ = small_scene()
    graphed = GraphedDetector(evaluated, SHAPE)
    for _ in range(2):
        expected, found = evaluated(images), graphed(images)
        assert sum(len(each["boxes"]) for each in expected) > 3
        for a, b in zip(found, expected, strict=True):
            assert sorted(a) == sorted(b)
            assert all(torch.equal(a[name], b[name]) for name in a)
    batch, _, _ = evaluated.preprocess(images)
    with torch.no_grad():
        _, wanted = evaluated.forward_padded(*batch[:2], None, batch.scales)
    assert all(map(torch.equal, graphed.padded(*batch), wanted))
    assert not graphed.padded(*batch).boxes.requires_grad


def test_fewer_images_than_the_bucket_holds(evaluated):
    images, _ = small_scene()
    graphed = GraphedDetector(evaluated, [SHAPE])
    graphed(images)
    expected, found = evaluated(images[1:2]), graphed(images[1:2])
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected[0])
    with pytest.raises(ValueError, match="4 images, but at most 3"):
        graphed([*images, images[0]])
    with pytest.raises(ValueError, match=r"sizes must be \[3, 2\]"):
        graphed.padded(torch.zeros(SHAPE), torch.ones(2, 2))


def test_bf16_detections_are_those_under_autocast(evaluated):
    images, _ = small_scene()
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluated(images)
    found = GraphedDetector(evaluated, SHAPE, amp=torch.bfloat16)(images)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_inference_mode_leaves_nothing_behind():
    images, targets = small_scene()
    model = detector().eval()
    graphed = GraphedDetector(model, SHAPE)
    with torch.inference_mode():
        first = graphed(images)
    again = graphed(images)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
    training = trainer()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch\.inference_mode"):
        training.step(images, targets)
    training.step(images, targets)
    assert len(training.losses()) == 1


def overwrite_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run writes over the outputs of the last, as that of a graph does."""

    def static_program(step: StaticStep) -> Program:
        outputs: list[Any] = []

        def run() -> Any:
            output = step.function(*step.inputs)
            if outputs:
                for buffer, value in zip(outputs[0], output, strict=True):
                    buffer.copy_(value)
            else:
                outputs.append(output)
            return outputs[0]

        return Program(step.inputs, run, 0, lambda: None)

    monkeypatch.setattr("fastdet.graphs.capture.eager_program", static_program)


def test_results_outlive_the_next_call(evaluated, monkeypatch):
    images, targets = small_scene()
    expected = []
    for overwrites in (False, True):
        if overwrites:
            overwrite_outputs(monkeypatch)
        graphed, training = GraphedDetector(evaluated, SHAPE), trainer()
        first = graphed(images)
        kept = copy.deepcopy(first)
        assert not torch.equal(graphed([1 - image for image in images])[0]["boxes"], first[0]["boxes"])
        torch.testing.assert_close(first, kept, rtol=0, atol=0)
        torch.manual_seed(1)
        for factor in (1, 2):
            training.step([image * factor for image in images], targets)
        expected.append(training.losses())
    assert expected[0] == expected[1]
    assert expected[0][0]["loss"] != expected[0][1]["loss"]
