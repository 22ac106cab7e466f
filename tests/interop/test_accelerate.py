"""`accelerate`: the outputs of torchvision's detectors stay, and `undo` restores the models."""

import copy
import math
import pickle
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

import fastdet
from fastdet.interop.accelerate import accelerate
from fastdet.interop.accelerated_modules import ACCELERATED
from tests.helpers.detectors import PYRAMID_SETTINGS, Pyramid

SHARED = {"rpn", "roi_heads", "roi_heads.box_roi_pool"}
BoxCoder = RegionProposalNetwork.__annotations__["box_coder"]
Matcher = RegionProposalNetwork.__annotations__["proposal_matcher"]
BUILDERS = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn"]


def randomize_heads(model):
    """Heads whose outputs differ from box to box."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and ("rpn.head" in name or "predictor" in name):
            nn.init.normal_(parameter, std=2 / math.sqrt(parameter[0].numel()))
    return model.eval()


def built(builder, classes=5, **changes):
    settings = {**PYRAMID_SETTINGS, "box_batch_size_per_image": 32, "rpn_post_nms_top_n_test": 40, **changes}
    model = getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=classes, **settings)
    randomize_heads(model)
    # The features of random residual networks with frozen norms overflow otherwise.
    with torch.no_grad():
        features = model.backbone(torch.randn(1, 3, 160, 160))
        for level, block in zip(features.values(), model.backbone.fpn.layer_blocks, strict=False):
            block[0].weight /= level.std()
    return model


def small(kind=detection.FasterRCNN, **changes):
    anchors = AnchorGenerator(((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3)
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    return randomize_heads(
        kind(Pyramid(), 5, rpn_anchor_generator=anchors, box_roi_pool=pool, **{**PYRAMID_SETTINGS, **changes})
    )


def pair(model):
    """The model, and an accelerated copy of it."""
    ours = copy.deepcopy(model)
    accelerate(ours)
    return model, ours


@pytest.fixture(scope="module")
def scene():
    """Images of several sizes; the second has no boxes."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) for size in ((96, 120), (120, 96), (133, 97))]
    targets = []
    for image in images:
        extent = torch.tensor([image.shape[2], image.shape[1]])
        corner = torch.rand(4, 2, generator=generator) * extent * 0.6
        side = 5 + torch.rand(4, 2, generator=generator) * extent * 0.35
        labels = torch.randint(1, 5, (4,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], dim=1), "labels": labels})
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, targets


def same_detections(theirs, ours, images, at_least=10, **more):
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
    assert sum(len(one["boxes"]) for one in expected) >= at_least
    for one, other in zip(expected, found, strict=True):
        assert list(one) == list(other)
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(other["boxes"], one["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(other["scores"], one["scores"], rtol=0, atol=1e-5)
        for name, tolerance in more.items():
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=tolerance)


def losses_and_gradients(model, images, targets):
    model.train().zero_grad()
    torch.manual_seed(5)
    losses = model(images, [dict(target) for target in targets])
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_losses(theirs, ours, images, targets):
    expected, expected_grads = losses_and_gradients(theirs, images, targets)
    found, grads = losses_and_gradients(ours, images, targets)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert expected_grads.keys() == grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_builders_models(builder, scene):
    theirs, ours = pair(built(builder, box_score_thresh=0.02))
    images, targets = scene[0][:2], scene[1][:2]
    same_detections(theirs, ours, images)
    same_losses(theirs, ours, images, targets)


def test_mask_rcnn(scene):
    model = built("maskrcnn_resnet50_fpn", box_score_thresh=0.02)
    theirs, ours = pair(model)
    assert set(accelerate(ours).replaced) == SHARED | {"roi_heads.mask_roi_pool"}
    same_detections(theirs, ours, scene[0], masks=1e-4)
    masks = [torch.rand(len(t["boxes"]), *image.shape[1:]).round().byte() for image, t in zip(*scene, strict=True)]
    same_losses(theirs, ours, scene[0], [{**t, "masks": mask} for t, mask in zip(scene[1], masks, strict=True)])


def test_keypoint_rcnn(scene):
    model = built("keypointrcnn_resnet50_fpn", classes=2, num_keypoints=3, box_score_thresh=0.0)
    theirs, ours = pair(model)
    assert set(accelerate(ours).replaced) == SHARED | {"roi_heads.keypoint_roi_pool"}
    same_detections(theirs, ours, scene[0], keypoints=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rpn_score_thresh": 0.6},
        {"box_score_thresh": 0.3, "box_nms_thresh": 0.2, "rpn_nms_thresh": 0.4},
        {"rpn_pre_nms_top_n_test": 1000, "rpn_post_nms_top_n_test": 1000, "box_detections_per_img": 1000},
        {"min_size": (64, 128), "max_size": 130},
    ],
    ids=lambda changes: ", ".join(changes) or "defaults",
)
def test_settings(changes, scene):
    theirs, ours = pair(small(**changes))
    same_detections(theirs, ours, scene[0], at_least=1)
    theirs.transform.min_size = ours.transform.min_size = (96,)
    same_losses(theirs, ours, *scene)


def test_settings_changed_later_take_effect(scene):
    theirs, ours = pair(small())
    same_detections(theirs, ours, scene[0])
    for model in (theirs, ours):
        model.rpn._pre_nms_top_n = {"training": 40, "testing": 30}
        model.rpn._post_nms_top_n = {"training": 35, "testing": 20}
        model.rpn.nms_thresh, model.rpn.min_size, model.rpn.score_thresh = 0.5, 20.0, 0.1
        model.rpn.proposal_matcher.high_threshold = 0.5
        model.rpn.box_coder.bbox_xform_clip = 0.5
        model.roi_heads.score_thresh, model.roi_heads.nms_thresh = 0.1, 0.3
        model.roi_heads.detections_per_img = 7
        model.roi_heads.proposal_matcher.high_threshold, model.roi_heads.proposal_matcher.low_threshold = 0.6, 0.4
        model.roi_heads.box_coder.weights = (5.0, 5.0, 2.0, 2.0)
        model.roi_heads.box_roi_pool.sampling_ratio = 3
    same_detections(theirs, ours, scene[0])
    same_losses(theirs, ours, *scene)


def test_images_without_boxes(scene):
    theirs, ours = pair(small())
    same_losses(theirs, ours, scene[0], [scene[1][1]] * 3)


def test_nothing_is_found(scene):
    theirs, ours = pair(small(box_score_thresh=1.1))
    same_detections(theirs, ours, scene[0], at_least=0)
    theirs, ours = pair(small(rpn_score_thresh=1.1))
    same_detections(theirs, ours, scene[0], at_least=0)


def test_the_same_seed_draws_the_same_samples(scene):
    theirs, ours = pair(small(rpn_batch_size_per_image=8, box_batch_size_per_image=6))
    same_losses(theirs, ours, *scene)


def test_after_training_in_inference_mode_first(scene):
    theirs, ours = pair(small())
    with torch.inference_mode():
        ours(scene[0]), theirs(scene[0])
    same_losses(theirs, ours, *scene)


def test_bfloat16_autocast_is_close(scene):
    theirs, ours = pair(small(rpn_pre_nms_top_n_test=1000))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected, found = theirs(scene[0]), ours(scene[0])
        for one, other in zip(expected, found, strict=True):
            assert one["boxes"].dtype == other["boxes"].dtype
            assert one["scores"].dtype == other["scores"].dtype
            assert len(other["boxes"]) > 0
            top = torchvision.ops.box_iou(one["boxes"].float(), other["boxes"].float()).amax(1)
            assert (top > 0.5).float().mean() > 0.5
        expected, found = losses_and_gradients(theirs, *scene)[0], losses_and_gradients(ours, *scene)[0]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0.2, atol=0.05)


def test_float64_goes_to_torchvision(scene):
    theirs, ours = pair(small().double())
    images = [image.double() for image in scene[0]]
    same_detections(theirs, ours, images)
    same_losses(theirs, ours, images, [{**target, "boxes": target["boxes"].double()} for target in scene[1]])


def test_thresholds_outside_0_to_1_go_to_torchvision(scene):
    theirs, ours = pair(small(rpn_nms_thresh=1.5, box_nms_thresh=-0.5))
    same_detections(theirs, ours, scene[0], at_least=3)


def test_torchvisions_methods_are_not_called(scene, monkeypatch):
    model = small()
    accelerate(model)
    model(scene[0])  # torchvision infers the scales of the pooling at the first call

    def refuse(*args):
        raise AssertionError("torchvision's own method was called")

    for origin, accelerated in ACCELERATED.items():
        for name in vars(accelerated):
            if not name.startswith("__"):
                monkeypatch.setattr(origin, name, refuse)
    with torch.no_grad():
        assert sum(len(found["boxes"]) for found in model(scene[0]))
    losses_and_gradients(model, *scene)


def classes_and_attributes(model):
    """The class and a copy of the dictionary of each module and box coder."""
    owners = [*model.modules(), model.rpn.box_coder, model.roi_heads.box_coder]
    return [type(owner) for owner in owners], [dict(vars(owner)) for owner in owners]


def accelerated_parts(model):
    return {path for path, part in model.named_modules() if type(part) in ACCELERATED.values()}


def test_undo_restores_the_model(scene):
    model = small()
    calls = []
    model.roi_heads.box_roi_pool.register_forward_hook(lambda *_: calls.append("pool"))
    model(scene[0])  # torchvision infers the scales of the pooling at the first call
    classes, attributes = classes_and_attributes(model)
    keys = list(model.state_dict())
    done = accelerate(model)
    assert type(model) is detection.FasterRCNN
    assert not model.training
    assert list(model.state_dict()) == keys
    assert not done.kept
    assert set(done.replaced) == SHARED == accelerated_parts(model)
    assert set(str(done).removeprefix("replaced: ").split(", ")) == SHARED
    calls.clear()
    model(scene[0])
    assert calls == ["pool"]
    done.undo()
    done.undo()
    classes_after, attributes_after = classes_and_attributes(model)
    assert classes_after == classes
    for before, after in zip(attributes, attributes_after, strict=True):
        before.pop("cell_anchors", None), after.pop("cell_anchors", None)
        assert before.keys() == after.keys()
        assert all(before[key] is after[key] for key in before)
    again = accelerate(model)
    done.undo()
    assert accelerated_parts(model) == SHARED, "a second undo must not undo a later call"
    again.undo()


def test_undo_leaves_what_was_replaced_since():
    model = small()
    done = accelerate(model)
    model.rpn.__class__ = ShyRPN
    done.undo()
    assert type(model.rpn) is ShyRPN
    assert not accelerated_parts(model)


def test_the_second_time_changes_nothing():
    model = small()
    first = accelerate(model)
    before = classes_and_attributes(model)
    second = accelerate(model)
    assert first == second
    assert classes_and_attributes(model) == before
    second.undo()
    first.undo()
    assert not accelerated_parts(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied, scene):
    theirs, ours = pair(small())
    same_detections(theirs, ours, scene[0])
    other = copied(ours)
    assert accelerated_parts(other) == SHARED
    other.roi_heads.detections_per_img = theirs.roi_heads.detections_per_img = 5
    same_detections(theirs, other, scene[0])
    assert ours.roi_heads.detections_per_img == PYRAMID_SETTINGS["box_detections_per_img"]
    accelerate(other).undo()
    assert not accelerated_parts(other)
    assert accelerated_parts(ours) == SHARED


def test_the_pooling_of_an_accelerated_model_gives_fastdets_settings():
    model = small()
    accelerate(model)
    detector = fastdet.FasterRCNN(Pyramid(), 5, box_roi_pool=model.roi_heads.box_roi_pool)
    assert detector.settings.box_featmap_names == ("0", "1")
    assert detector.settings.box_pool_size == 7


class ShyRPN(detection.rpn.RegionProposalNetwork):
    def filter_proposals(self, *args):
        boxes, scores = super().filter_proposals(*args)
        return [one[:3] for one in boxes], [one[:3] for one in scores]


class ShiftedAnchors(AnchorGenerator):
    def forward(self, *args):
        return [anchors + 1 for anchors in super().forward(*args)]


class HalvingCoder(BoxCoder):
    def decode(self, rel_codes, boxes):
        return super().decode(rel_codes / 2, boxes)


class BestOnlyMatcher(Matcher):
    def __call__(self, match_quality_matrix):
        return super().__call__(match_quality_matrix).clamp(max=0)


class Subclass(detection.FasterRCNN):
    """A subclass that changes no part."""


def change_rpn(model):
    model.rpn.__class__ = ShyRPN


def change_anchors(model):
    model.rpn.anchor_generator = ShiftedAnchors(((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3)


def change_coder(model):
    model.roi_heads.box_coder = HalvingCoder((10.0, 10.0, 5.0, 5.0))


def change_pool(model):
    class Pool(MultiScaleRoIAlign):
        def forward(self, *args):
            return super().forward(*args) * 2

    model.roi_heads.box_roi_pool = Pool(["0", "1"], 7, 2)


def change_similarity(model):
    model.rpn.box_similarity = torchvision.ops.generalized_box_iou


def change_matcher(model):
    model.roi_heads.proposal_matcher = BestOnlyMatcher(0.5, 0.5)


def change_method(model):
    inherited = model.rpn.filter_proposals
    model.rpn.filter_proposals = lambda *args: inherited(*args)


@pytest.mark.parametrize(
    ("change", "kept", "word"),
    [
        (change_rpn, {"rpn"}, "ShyRPN"),
        (change_anchors, set(), ""),
        (change_coder, {"roi_heads.box_coder"}, "HalvingCoder"),
        (change_pool, {"roi_heads.box_roi_pool"}, "Pool"),
        (change_similarity, {"rpn.box_similarity"}, "generalized_box_iou"),
        (change_matcher, {"roi_heads.proposal_matcher"}, "BestOnlyMatcher"),
        (change_method, {"rpn"}, "filter_proposals was set on the instance"),
    ],
)
def test_what_is_not_torchvisions_is_kept(change, kept, word, scene):
    torch.manual_seed(0)
    theirs = small()
    torch.manual_seed(0)
    ours = small(Subclass)
    change(theirs), change(ours)
    done = accelerate(ours)
    assert set(done.kept) == kept
    assert set(done.replaced) == SHARED - kept
    assert all(word in reason for reason in done.kept.values())
    assert all(f"kept: {name}: " in str(done) for name in kept)
    same_detections(theirs, ours, scene[0], at_least=3)
    same_losses(theirs, ours, *scene)


@pytest.mark.parametrize("change", [change_coder, change_similarity, change_matcher])
def test_what_is_changed_later_is_not_replaced(change, scene):
    theirs, ours = pair(small())
    change(theirs), change(ours)
    same_detections(theirs, ours, scene[0], at_least=3)
    same_losses(theirs, ours, *scene)


def test_a_missing_part_is_reported():
    model = small()
    del model.roi_heads.box_roi_pool
    assert accelerate(model).kept == {"roi_heads.box_roi_pool": "the model has none"}


def unsupported_models():
    yield "RetinaNet", detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    yield "fastdet.models.faster_rcnn.FasterRCNN", fastdet.FasterRCNN("mobilenet_v2", 5)
    yield "RecursiveScriptModule", torch.jit.script(small())
    yield "OptimizedModule", torch.compile(small())
    yield "DataParallel", nn.DataParallel(small())
    model = small()
    model.compile()
    yield "compiled torchvision", model
    yield "builtins.int", 3


def test_errors():
    for name, model in unsupported_models():
        with pytest.raises(TypeError, match=name):
            accelerate(model)


def test_scripting_after_undo():
    model = small()
    acceleration = accelerate(model)
    with pytest.raises(RuntimeError, match="undo the acceleration"):
        torch.jit.script(model)
    acceleration.undo()
    torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_takes_torchvisions_methods(scene):
    theirs, ours = pair(small())
    levels = {"0": torch.rand(1, 8, 12, 15), "1": torch.rand(1, 8, 6, 8)}
    boxes = scene[1][0]["boxes"]

    class Pooled(nn.Module):
        def __init__(self, pool):
            super().__init__()
            self.pool = pool

        def forward(self, fine, middle, boxes):
            return self.pool({"0": fine, "1": middle}, [boxes], [(96, 120)])

    graphs = [
        torch.jit.trace(Pooled(model.roi_heads.box_roi_pool), (*levels.values(), boxes), check_trace=False)
        for model in (theirs, ours)
    ]
    assert "fastdet::" not in str(graphs[1].inlined_graph)
    torch.testing.assert_close(graphs[1](*levels.values(), boxes), graphs[0](*levels.values(), boxes))


# The methods alone, against torchvision's, on inputs that a model seldom gives.


def random_proposals(generator, batch, counts):
    total = sum(counts)
    corner = torch.rand(batch, total, 2, generator=generator) * 200 - 20
    boxes = torch.cat([corner, corner + torch.rand(batch, total, 2, generator=generator) * 60], dim=2)
    return boxes, torch.randn(batch * total, 1, generator=generator) * 3


@pytest.mark.parametrize("counts", [(700, 90, 7, 1), (900,)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_proposals_level_by_level(seed, counts, monkeypatch):
    """Without torchvision's shift of coordinates the two are equal to the bit."""
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla)
    theirs, ours = (model.rpn for model in pair(small(rpn_score_thresh=0.05 * (seed % 2))))
    shapes = [(150, 120), (80, 200), (99, 99)]
    proposals, objectness = random_proposals(torch.Generator().manual_seed(seed), 3, counts)
    for top_n in (1000, 50, 5):
        for rpn in (theirs, ours):
            rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"] = top_n, top_n // 5
        expected = theirs.filter_proposals(proposals, objectness, shapes, list(counts))
        found = ours.filter_proposals(proposals, objectness, shapes, list(counts))
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(*both) for both in zip(one, other, strict=True))


def test_proposals_of_saturated_and_missing_scores():
    theirs, ours = (model.rpn for model in pair(small()))
    proposals, _ = random_proposals(torch.Generator().manual_seed(0), 1, [60])
    objectness = torch.arange(60.0)[:, None] - 20  # the sigmoid of the upper ones is 1
    objectness[::7] = float("nan")
    objectness[1::7] = -float("inf")
    expected = theirs.filter_proposals(proposals, objectness, [(200, 200)], [60])
    found = ours.filter_proposals(proposals, objectness, [(200, 200)], [60])
    assert torch.equal(expected[0][0], found[0][0])
    assert torch.equal(expected[1][0], found[1][0])


def random_detections(generator, counts, classes, spread):
    total = sum(counts)
    logits = torch.randn(total, classes, generator=generator) * spread
    corner = torch.rand(total, 2, generator=generator) * 150
    boxes = torch.cat([corner, corner + 5 + torch.rand(total, 2, generator=generator) * 60], dim=1)
    deltas = torch.randn(total, classes * 4, generator=generator)
    return logits, deltas, list(boxes.split(counts)), [(150, 120), (80, 200), (99, 99)]


@pytest.mark.parametrize("counts", [(40, 0, 25), (0, 0, 0), (1, 1, 1), (60, 60, 60)], ids=str)
def test_detections_class_by_class(counts, monkeypatch):
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla)
    theirs, ours = (model.roi_heads for model in pair(small(box_detections_per_img=1000)))
    for spread in (1.0, 3.0):
        given = random_detections(torch.Generator().manual_seed(2), counts, 5, spread)
        expected, found = theirs.postprocess_detections(*given), ours.postprocess_detections(*given)
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(*both) for both in zip(one, other, strict=True))


def test_targets(scene):
    theirs, ours = pair(small())
    generator = torch.Generator().manual_seed(7)
    for counts in ((5, 0, 9), (0, 0, 0), (1, 1, 1), (40, 3, 0)):
        gt = [detection_boxes(generator, count) for count in counts]
        labels = [torch.randint(1, 5, (count,), generator=generator) for count in counts]
        anchors = [torch.cat([detection_boxes(generator, 300), gt[0]])] * 3
        targets = [{"boxes": boxes} for boxes in gt]
        expected = theirs.rpn.assign_targets_to_anchors(anchors, targets)
        found = ours.rpn.assign_targets_to_anchors(anchors, targets)
        for one, other in zip(expected, found, strict=True):
            assert [torch.equal(*both) for both in zip(one, other, strict=True)] == [True] * 3
        proposals = [torch.cat([detection_boxes(generator, 20 + 5 * i), boxes]) for i, boxes in enumerate(gt)]
        theirs.roi_heads.proposal_matcher.low_threshold = ours.roi_heads.proposal_matcher.low_threshold = 0.3
        expected = theirs.roi_heads.assign_targets_to_proposals(proposals, gt, labels)
        found = ours.roi_heads.assign_targets_to_proposals(proposals, gt, labels)
        for one, other in zip(expected, found, strict=True):
            assert [torch.equal(*both) for both in zip(one, other, strict=True)] == [True] * 3


def detection_boxes(generator, count):
    corner = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corner, corner + 3 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def test_without_boxes_all_is_background_under_any_thresholds():
    theirs, ours = pair(small())
    boxes = [detection_boxes(torch.Generator().manual_seed(0), 6)] * 2
    gt, labels = [boxes[0][:2], torch.zeros(0, 4)], [torch.ones(2).long(), torch.zeros(0).long()]
    answers = []
    for model in (theirs, ours):
        model.rpn.proposal_matcher.low_threshold = model.roi_heads.proposal_matcher.low_threshold = 0.0
        of_anchors = model.rpn.assign_targets_to_anchors(boxes, [{"boxes": one} for one in gt])
        of_proposals = model.roi_heads.assign_targets_to_proposals(boxes, gt, labels)
        answers.append([one for part in (*of_anchors, *of_proposals) for one in part])
    assert all(torch.equal(*both) for both in zip(*answers, strict=True))
    assert not answers[0][1].any()


def test_a_ground_truth_box_that_no_anchor_overlaps():
    """An intended difference: torchvision then calls every anchor positive."""
    theirs, ours = pair(small())
    anchors = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])]
    targets = [{"boxes": torch.tensor([[50.0, 50, 60, 60]])}]
    assert theirs.rpn.assign_targets_to_anchors(anchors, targets)[0][0].tolist() == [1, 1]
    assert ours.rpn.assign_targets_to_anchors(anchors, targets)[0][0].tolist() == [0, 0]


def test_what_torchvision_refuses_is_refused():
    boxes = detection_boxes(torch.Generator().manual_seed(0), 3)
    for model in pair(small()):
        with pytest.raises(ValueError, match="No proposal boxes"):
            model.roi_heads.assign_targets_to_proposals([torch.zeros(0, 4)], [boxes], [torch.ones(3).long()])
        with pytest.raises(IndexError):
            model.roi_heads.assign_targets_to_proposals([boxes], [boxes], [torch.ones(2).long()])


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_the_ground_truth_keeps_its_precision(dtypes):
    theirs, ours = pair(small())
    boxes = detection_boxes(torch.Generator().manual_seed(0), 6)
    targets = [{"boxes": (boxes + 0.01).to(dtype)} for dtype in dtypes]
    expected = theirs.rpn.assign_targets_to_anchors([boxes, boxes], targets)
    found = ours.rpn.assign_targets_to_anchors([boxes, boxes], targets)
    for one, other in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def pools(names, ratio=2):
    """torchvision's pooling and an accelerated one."""
    theirs, ours = pair(small())
    for model in (theirs, ours):
        model.roi_heads.box_roi_pool = MultiScaleRoIAlign(names, (3, 5), ratio, canonical_scale=40, canonical_level=3)
    accelerate(ours)
    return theirs.roi_heads.box_roi_pool, ours.roi_heads.box_roi_pool


@pytest.mark.parametrize(
    ("strides", "replaced"),
    [((4, 8, 16), True), ((8,), True), ((32, 32), True), ((8, 16, 16), True), ((4, 16), False), ((8, 8, 16), False)],
    ids=str,
)
@pytest.mark.parametrize("ratio", [2, -1])
def test_pooling(strides, replaced, ratio, monkeypatch):
    """Of one level, of levels that fall by halves, and of others, which go to torchvision."""
    names = [str(level) for level in range(len(strides))]
    theirs, ours = pools(names, ratio)
    boxes = [detection_boxes(torch.Generator().manual_seed(0), 30), torch.zeros(0, 4)]
    levels = {name: torch.rand(2, 3, 128 // stride, 160 // stride) for name, stride in zip(names, strides, strict=True)}
    given = {"other": torch.zeros(1), **levels}, boxes, [(128, 150), (100, 160)]
    expected = theirs(*given)
    spy = mock.Mock(wraps=fastdet.ops.multiscale_roi_align)
    monkeypatch.setattr(fastdet.ops, "multiscale_roi_align", spy)
    torch.testing.assert_close(ours(*given), expected)
    assert spy.call_count == replaced
    assert ours.scales == theirs.scales
    assert vars(ours.map_levels) == vars(theirs.map_levels)


def test_pooling_of_other_inputs_goes_to_torchvision(monkeypatch):
    """Levels of several dtypes, fewer lists of boxes than images, another rule for the level."""
    theirs, ours = pools(["0", "1"])
    monkeypatch.setattr(fastdet.ops, "multiscale_roi_align", None)
    boxes = [detection_boxes(torch.Generator().manual_seed(0), 30)] * 2
    levels = {"0": torch.rand(2, 3, 32, 40), "1": torch.rand(2, 3, 16, 20)}
    sizes = [(128, 160)] * 2
    mixed = {"0": levels["0"], "1": levels["1"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(mixed, boxes, sizes), theirs(mixed, boxes, sizes))
    assert torch.equal(ours(levels, boxes[:1], sizes), theirs(levels, boxes[:1], sizes))
    ours.map_levels.eps = theirs.map_levels.eps = 0.5
    assert torch.equal(ours(levels, boxes, sizes), theirs(levels, boxes, sizes))


@pytest.mark.cuda
def test_on_a_gpu(scene, monkeypatch):
    # Where results must repeat, torchvision compiles RoI align anew for every shape.
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = small().cuda()
    theirs, ours = pair(model)
    images = [image.cuda() for image in scene[0]]
    targets = [{name: value.cuda() for name, value in target.items()} for target in scene[1]]
    same_detections(theirs, ours, images)
    expected, _ = losses_and_gradients(theirs, images, targets)
    found, _ = losses_and_gradients(ours, images, targets)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
