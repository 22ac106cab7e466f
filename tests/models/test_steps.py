"""Each step of the detector against the loops of oracle.py, in float64."""

import numpy as np
import pytest
import torch

from tests.helpers import oracle
from tests.helpers.detectors import NUM_CLASSES, small_detector, small_scene

# With quotas this large everything that may be sampled is, and nothing is left to chance.
EVERYTHING = {
    # The loops know nothing of ignored regions.
    "ignore_iof_thresh": None,
    "rpn_batch_size_per_image": 2000,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 100,
    "box_positive_fraction": 1.0,
}


def truth_of(targets, sizes, originals, i):
    """Boxes scaled to the resized image and clipped, and labels, of the targets that are trained on."""
    height, width = sizes[i]
    factor = np.array([width / originals[i][1], height / originals[i][0]] * 2)
    keep = ~targets[i].get("ignore", torch.zeros(len(targets[i]["boxes"]), dtype=torch.bool)).numpy()
    boxes = targets[i]["boxes"].double().numpy()[keep] * factor
    return [oracle.clip(box, height, width) for box in boxes], targets[i]["labels"].numpy()[keep]


@pytest.fixture(scope="module", params=[True, False], ids=["inside only", "all anchors"])
def seen(request):
    model = small_detector(rpn_anchors_inside_only=request.param, **EVERYTHING).train()
    images, targets = small_scene()
    torch.manual_seed(7)
    found = model.inspect(images, targets)
    originals = [tuple(image.shape[-2:]) for image in images]
    # By hand from 64 / 96 pixels: 96 x 70 shrinks by 64 / 70.
    sizes = [(64, 80), (87, 64), (64, 80)]
    return model, targets, originals, sizes, found


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(actual.detach().double()), expected, rtol=tolerance, atol=tolerance)


def test_anchors(seen):
    _, _, _, sizes, found = seen
    grid = found["features"].shape[-2:]
    assert tuple(found["images"].shape) == (3, 3, 87, 80)
    expected = oracle.anchors(grid, 16, (16, 32), (0.5, 1.0, 2.0), 8)
    close(found["anchors"], expected)
    inside = [[oracle.is_inside(box, *size) for box in expected] for size in sizes]
    assert found["anchors_inside"].tolist() == inside
    assert 0 < np.sum(inside) < np.size(inside)


def test_anchor_targets(seen):
    model, targets, originals, sizes, found = seen
    for i in range(3):
        truth, _ = truth_of(targets, sizes, originals, i)
        anchors = found["anchors"].double().numpy()
        labels, locs = oracle.anchor_targets(anchors, truth, *sizes[i], model.settings)
        assert found["anchor_labels"][i].tolist() == labels.tolist()
        close(found["anchor_deltas"][i], locs)
    assert {-1, 0, 1} == set(found["anchor_labels"].flatten().tolist()) or not model.settings.rpn_anchors_inside_only


def test_proposals(seen):
    model, _, originals, sizes, found = seen
    scores, locs = found["rpn_logits"].detach().double().numpy(), found["rpn_deltas"].detach().double().numpy()
    for i in range(3):
        scale = min(64 / min(originals[i]), 96 / max(originals[i]))
        expected = oracle.proposals(
            found["anchors"].double().numpy(), locs[i], scores[i], *sizes[i], scale, model.settings, training=True
        )
        count = int(found["proposals"].count[i])
        assert count == len(expected) > 3
        close(found["proposals"].boxes[i, :count], expected)
        assert (found["proposals"].boxes[i, count:] == 0).all()


def test_roi_targets(seen):
    model, targets, originals, sizes, found = seen
    kinds = set()
    for i in range(3):
        truth, truth_labels = truth_of(targets, sizes, originals, i)
        count = int(found["proposals"].count[i])
        candidates = found["proposals"].boxes[i, :count].double().tolist() + truth
        expected = oracle.roi_targets(candidates, truth, truth_labels, model.settings)
        # Positives come first, each kind in the order of the candidates.
        expected = sorted(expected, key=lambda row: row[1] == 0)
        samples = found["samples"]
        taken = samples.weight[i] > 0
        assert int(taken.sum()) == len(expected)
        close(samples.boxes[i][taken], np.array([row[0] for row in expected]).reshape(-1, 4))
        assert samples.labels[i][taken].tolist() == [row[1] for row in expected]
        close(samples.deltas[i][taken], np.array([row[2] for row in expected]).reshape(-1, 4), 1e-3)
        assert (samples.boxes[i][~taken] == 0).all()
        assert (samples.labels[i][~taken] == 0).all()
        kinds |= set(samples.labels[i][taken].tolist())
    assert len(kinds) >= 3, "the case samples hardly anything"


def test_losses(seen):
    model, _, _, _, found = seen
    numbers = {name: found[name].detach().double().numpy() for name in ("rpn_logits", "rpn_deltas")}
    labels = found["anchor_labels"].numpy().reshape(-1)
    locs = found["anchor_deltas"].double().numpy().reshape(-1, 4)
    objectness, rpn_box = oracle.rpn_losses(
        numbers["rpn_logits"].reshape(-1, 2), numbers["rpn_deltas"].reshape(-1, 4), labels, locs, model.settings
    )
    taken = found["samples"].weight > 0
    classifier, box = oracle.roi_losses(
        found["class_logits"][taken].detach().double().numpy(),
        found["box_deltas"][taken].detach().double().numpy(),
        found["samples"].labels[taken].numpy(),
        found["samples"].deltas[taken].double().numpy(),
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
    sizes, originals = [(64, 80), (87, 64), (64, 80)], [tuple(image.shape[-2:]) for image in images]
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
        factor = np.array([originals[i][1] / sizes[i][1], originals[i][0] / sizes[i][0]] * 2)
        close(results[i]["boxes"], np.array([box for _, _, box in expected]) * factor)
    total = (NUM_CLASSES - 1) * found["proposals"].boxes.shape[1]
    assert found["detections"].boxes.shape[1] == (total if cap is None else cap)
