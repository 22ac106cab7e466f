"""Each step of the detector against the loops of oracle.py, in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastdet.models import roi_heads
from fastdet.models.settings import VGG16
from fastdet.structures import Proposals
from tests.helpers import oracle
from tests.helpers.detectors import NUM_CLASSES, small_detector, small_scene

# With quotas this large every candidate is sampled, so that nothing is random.
EVERYTHING = {
    # The loops do not handle ignored regions.
    "ignore_iof_thresh": None,
    "rpn_batch_size_per_image": 2000,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 100,
    "box_positive_fraction": 1.0,
}


def truth_of(targets, sizes, original_sizes, i):
    """Boxes scaled to the resized image and clipped, and labels, of the targets that are trained on."""
    height, width = sizes[i]
    factor = np.array([width / original_sizes[i][1], height / original_sizes[i][0]] * 2)
    keep = ~targets[i].get("ignore", torch.zeros(len(targets[i]["boxes"]), dtype=torch.bool)).numpy()
    boxes = targets[i]["boxes"].double().numpy()[keep] * factor
    return [oracle.clip(box, height, width) for box in boxes], targets[i]["labels"].numpy()[keep]


@pytest.fixture(scope="module", params=[True, False], ids=["inside only", "all anchors"])
def inspected(request):
    model = small_detector(rpn_anchors_inside_only=request.param, **EVERYTHING).train()
    images, targets = small_scene()
    torch.manual_seed(7)
    found = model.inspect(images, targets)
    original_sizes = [tuple(image.shape[-2:]) for image in images]
    # By hand from 64 / 96 pixels: 96 x 70 shrinks by 64 / 70.
    sizes = [(64, 80), (87, 64), (64, 80)]
    return model, targets, original_sizes, sizes, found


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(actual.detach().double()), expected, rtol=tolerance, atol=tolerance)


def test_anchors(inspected):
    _, _, _, sizes, found = inspected
    grid = found["features"].shape[-2:]
    assert tuple(found["images"].shape) == (3, 3, 87, 80)
    expected = oracle.anchors(grid, 16, (16, 32), (0.5, 1.0, 2.0), 8)
    close(found["anchors"], expected)
    inside = [[oracle.is_inside(box, *size) for box in expected] for size in sizes]
    assert found["anchors_inside"].tolist() == inside
    assert 0 < np.sum(inside) < np.size(inside)


def test_anchor_targets(inspected):
    model, targets, original_sizes, sizes, found = inspected
    for i in range(3):
        truth, _ = truth_of(targets, sizes, original_sizes, i)
        anchors = found["anchors"].double().numpy()
        labels, deltas = oracle.anchor_targets(anchors, truth, *sizes[i], model.settings)
        assert found["anchor_labels"][i].tolist() == labels.tolist()
        close(found["anchor_deltas"][i], deltas)
    assert {-1, 0, 1} == set(found["anchor_labels"].flatten().tolist()) or not model.settings.rpn_anchors_inside_only


def test_proposals(inspected):
    model, _, original_sizes, sizes, found = inspected
    scores, deltas = found["rpn_logits"].detach().double().numpy(), found["rpn_deltas"].detach().double().numpy()
    for i in range(3):
        scale = min(64 / min(original_sizes[i]), 96 / max(original_sizes[i]))
        expected = oracle.proposals(
            found["anchors"].double().numpy(), deltas[i], scores[i], *sizes[i], scale, model.settings, training=True
        )
        count = int(found["proposals"].count[i])
        assert count == len(expected) > 3
        close(found["proposals"].boxes[i, :count], expected)
        assert (found["proposals"].boxes[i, count:] == 0).all()


def test_roi_targets(inspected):
    model, targets, original_sizes, sizes, found = inspected
    kinds = set()
    for i in range(3):
        truth, truth_labels = truth_of(targets, sizes, original_sizes, i)
        count = int(found["proposals"].count[i])
        candidates = found["proposals"].boxes[i, :count].double().tolist() + truth
        expected = oracle.roi_targets(candidates, truth, truth_labels, model.settings)
        # Positives come first, each kind in the order of the candidates.
        expected = sorted(expected, key=lambda row: row[1] == 0)
        samples = found["samples"]
        valid = samples.weight[i] > 0
        assert int(valid.sum()) == len(expected)
        close(samples.boxes[i][valid], np.array([row[0] for row in expected]).reshape(-1, 4))
        assert samples.labels[i][valid].tolist() == [row[1] for row in expected]
        close(samples.deltas[i][valid], np.array([row[2] for row in expected]).reshape(-1, 4), 1e-3)
        assert (samples.boxes[i][~valid] == 0).all()
        assert (samples.labels[i][~valid] == 0).all()
        kinds |= set(samples.labels[i][valid].tolist())
    assert len(kinds) >= 3, "the case samples hardly anything"


def test_losses(inspected):
    model, _, _, _, found = inspected
    outputs = {name: found[name].detach().double().numpy() for name in ("rpn_logits", "rpn_deltas")}
    labels = found["anchor_labels"].numpy().reshape(-1)
    deltas = found["anchor_deltas"].double().numpy().reshape(-1, 4)
    objectness, rpn_box = oracle.rpn_losses(
        outputs["rpn_logits"].reshape(-1, 2), outputs["rpn_deltas"].reshape(-1, 4), labels, deltas, model.settings
    )
    valid = found["samples"].weight > 0
    classifier, box = oracle.roi_losses(
        found["class_logits"][valid].detach().double().numpy(),
        found["box_deltas"][valid].detach().double().numpy(),
        found["samples"].labels[valid].numpy(),
        found["samples"].deltas[valid].double().numpy(),
        model.settings,
    )
    losses = found["losses"]
    close(losses["loss_objectness"], objectness)
    close(losses["loss_rpn_box_reg"], rpn_box)
    close(losses["loss_classifier"], classifier)
    close(losses["loss_box_reg"], box)
    assert rpn_box > 0
    assert box > 0


@pytest.mark.parametrize("cap", [None, 7])
def test_detections(cap):
    model = small_detector(box_detections_per_img=cap).eval()
    images, _ = small_scene()
    found = model.inspect(images)
    results = model(images)
    sizes, original_sizes = [(64, 80), (87, 64), (64, 80)], [tuple(image.shape[-2:]) for image in images]
    for i in range(3):
        count = int(found["proposals"].count[i])
        expected = oracle.detections(
            found["proposals"].boxes[i, :count].double().numpy(),
            found["box_deltas"][i, :count].detach().double().numpy(),
            found["class_logits"][i, :count].detach().double().numpy(),
            *sizes[i],
            model.settings,
        )
        assert len(expected) > 3
        assert results[i]["labels"].tolist() == [label for _, label, _ in expected]
        close(results[i]["scores"], [score for score, _, _ in expected])
        factor = np.array([original_sizes[i][1] / sizes[i][1], original_sizes[i][0] / sizes[i][0]] * 2)
        close(results[i]["boxes"], np.array([box for _, _, box in expected]) * factor)
    total = (NUM_CLASSES - 1) * found["proposals"].boxes.shape[1]
    assert found["detections"].boxes.shape[1] == (total if cap is None else cap)


@pytest.mark.parametrize("cap", [None, 9])
def test_blocks_of_classes_change_nothing(monkeypatch, cap):
    heads = roi_heads.RoIHeads(4, 8, dataclasses.replace(VGG16, box_detections_per_img=cap)).eval()
    boxes = torch.rand(2, 20, 4) * 30
    boxes[..., 2:] += boxes[..., :2]
    proposals = Proposals(boxes, torch.ones(2, 20), torch.tensor([20, 13]))
    # Few values, so that scores of several classes are equal.
    logits, deltas = torch.randn(2, 20, 8).mul(2).round(), torch.randn(2, 20, 32)
    sizes = torch.tensor([[50, 60], [40, 60]])
    whole = heads.postprocess_detections(logits, deltas, proposals, sizes)
    assert (whole.count > 5).all()
    for most in (1, 40, 60):
        monkeypatch.setattr(roi_heads, "_MOST_PAIRS", most)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        in_blocks = heads.postprocess_detections(logits, deltas, proposals, sizes)
        assert all(map(torch.equal, in_blocks, whole))


@pytest.mark.parametrize("cap", [None, 9, 45])
@pytest.mark.parametrize("spread", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("least_side", [0.0, 15.0])
def test_work_for_candidates_alone_gives_the_same(monkeypatch, cap, spread, least_side):
    """A graph decodes all classes of all proposals. Nothing is above the threshold, something is, or much."""
    changes = {"box_detections_per_img": cap, "box_min_size": least_side}
    heads = roi_heads.RoIHeads(4, 60, dataclasses.replace(VGG16, **changes)).eval()
    boxes = torch.rand(2, 20, 4) * 30
    boxes[..., 2:] += boxes[..., :2]
    proposals = Proposals(boxes, torch.ones(2, 20), torch.tensor([20, 13]))
    logits, deltas = torch.randn(2, 20, 60).mul(spread).round(), torch.randn(2, 20, 240)
    logits[0, 3] = math.nan
    sizes, leaves = torch.tensor([[50, 60], [40, 60]]), (logits.requires_grad_(), deltas.requires_grad_())

    def detect():
        found = heads.postprocess_detections(logits, deltas, proposals, sizes)
        return found, torch.autograd.grad((found.boxes + found.scores[..., None] ** 2).sum(), leaves)

    found, gradients = detect()
    assert (found.count > 0).all() == (spread > 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    in_a_graph, expected = detect()
    assert all(map(torch.equal, found, in_a_graph))
    torch.testing.assert_close(gradients, expected, equal_nan=True)


def test_no_proposals_give_no_detections():
    heads = roi_heads.RoIHeads(4, 5, VGG16).eval()
    proposals = Proposals(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.tensor([0, 0]))
    found = heads.postprocess_detections(
        torch.zeros(2, 0, 5), torch.zeros(2, 0, 20), proposals, torch.ones(2, 2).long()
    )
    assert found.count.tolist() == [0, 0]
