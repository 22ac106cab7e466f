"""The detector with torchvision's settings beside torchvision's own: same weights, same images, same outputs."""

import copy
import pickle

import pytest
import torch
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import fastdet
from tests.helpers.detectors import PYRAMID_SETTINGS, Pyramid
from tests.helpers.parity import (
    EVERYTHING,
    assert_same_detections,
    assert_same_gradients,
    assert_same_losses,
    sample_all_candidates,
    scene,
)
from tests.helpers.weights import randomize_heads

SIZES, RATIOS = ((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3


def both(**changes):
    """torchvision's detector and ours with the same weights; `changes` go to both."""
    torch.manual_seed(0)
    settings_of_both = {**PYRAMID_SETTINGS, **changes}
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    anchors = TheirAnchorGenerator(SIZES, RATIOS)
    theirs = TheirFasterRCNN(Pyramid(), 5, rpn_anchor_generator=anchors, box_roi_pool=pool, **settings_of_both)
    randomize_heads(theirs)
    sample_all_candidates(theirs)
    settings = fastdet.TORCHVISION.override(
        rpn_anchor_generator=fastdet.AnchorGenerator(SIZES, RATIOS),
        box_featmap_names=("0", "1"),
        **EVERYTHING,
        **settings_of_both,
    )
    ours = fastdet.FasterRCNN(Pyramid(), 5, settings=settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def images_and_targets():
    """Limited by the shorter and by the longer side; the second has no boxes."""
    return scene((64, 80), (96, 70), (133, 57), (50, 200))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rpn_score_thresh": 0.6},
        {"box_score_thresh": 0.3, "box_nms_thresh": 0.2, "rpn_nms_thresh": 0.4},
        {"min_size": (64, 128), "max_size": 130},
    ],
    ids=lambda changes: ", ".join(changes) or "default",
)
def test_detections(images_and_targets, changes):
    theirs, ours = both(**changes)
    images = images_and_targets[0]
    with torch.no_grad():
        assert_same_detections(theirs.eval()(images), ours.eval()(images))


def test_losses_and_gradients(images_and_targets):
    theirs, ours = both()
    images, targets = images_and_targets
    expected, found = theirs.train()(images, [dict(target) for target in targets]), ours.train()(images, targets)
    assert_same_losses(expected, found)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    assert_same_gradients(theirs, ours)


def test_what_is_too_small_is_dropped_where_torchvision_drops_it(images_and_targets):
    """torchvision's thresholds of sides are constants, so the test sets its attribute."""
    theirs, ours = both()
    theirs.rpn.min_size = 25.0
    ours.settings = ours.settings.override(rpn_min_size=25.0)
    images = images_and_targets[0]
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
    plain = both()[0].eval()(images)
    assert not torch.equal(plain[0]["boxes"], expected[0]["boxes"]), "the threshold drops nothing"
    assert_same_detections(expected, found)


def test_detections_carry_gradients_in_evaluation(images_and_targets):
    """Of each detection with respect to the images and to the weights, as torchvision's do."""
    theirs, ours = (model.eval() for model in both())
    gradients = []
    for model in (theirs, ours):
        images = [image.clone().requires_grad_() for image in images_and_targets[0]]
        found = model(images)
        loss = sum((each["scores"] ** 2).sum() + (each["boxes"] * each["scores"][:, None]).sum() / 99 for each in found)
        weights = model.roi_heads.box_predictor.bbox_pred.weight, model.rpn.head.bbox_pred.weight
        gradients.append(torch.autograd.grad(loss, [*images, *weights], materialize_grads=True))
    *expected, expected_rpn = gradients[0]
    *actual, actual_rpn = gradients[1]
    assert all(gradient.abs().max() > 0 for gradient in actual)
    assert not expected_rpn.any(), "proposals are constants"
    assert not actual_rpn.any()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_what_torchvisions_detector_takes_is_taken(images_and_targets):
    """A stacked batch, images of one channel, and boxes of whole numbers."""
    theirs, ours = both()
    stacked = torch.rand(2, 3, 64, 80)
    gray = [torch.rand(1, 64, 80), torch.rand(3, 50, 90)]
    with torch.no_grad():
        for images in (stacked, gray):
            assert_same_detections(theirs.eval()(images), ours.eval()(images))
    images, targets = images_and_targets
    whole = [{**target, "boxes": target["boxes"].round().long()} for target in targets]
    expected = theirs.train()(images, [dict(target) for target in whole])
    assert_same_losses(expected, ours.train()(images, whole))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_dtypes(images_and_targets, dtype):
    """The layers in that dtype, all between them in fp32."""
    ours = both()[1].eval()
    # One image: a CPU takes seconds for the fp16 gradients of the box head.
    images, targets = (each[:1] for each in images_and_targets)
    other = copy.deepcopy(ours).to(dtype)
    features = other.inspect(images)
    assert features["pooled"].dtype == dtype
    assert features["detections"].boxes.dtype == torch.float32
    ours.train(), other.train()
    expected, found = ours(images, targets), other(images, targets)
    tolerance = {torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=tolerance, atol=tolerance)
    sum(found.values()).backward()
    assert all(p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all()) for p in other.parameters())


def test_float64_by_default(images_and_targets):
    images, targets = images_and_targets
    torch.set_default_dtype(torch.float64)
    try:
        theirs, ours = both()
        assert next(ours.parameters()).dtype == torch.float64
        doubled = [image.double() for image in images]
        with torch.no_grad():
            expected, found = theirs.eval()(doubled), ours.eval()(doubled)
        ours.train()(doubled, targets)["loss_classifier"].backward()
    finally:
        torch.set_default_dtype(torch.float32)
    narrowed = [
        {name: value.float() if name != "labels" else value for name, value in each.items()} for each in expected
    ]
    assert_same_detections(narrowed, found)


@pytest.mark.parametrize("assign", [False, True])
def test_models_from_the_meta_device(images_and_targets, assign):
    """Constants too have their values: means and deviations of pixels, anchors, weights of classes."""
    settings = both()[1].settings.override(class_weights=(1.0, 2.0, 3.0, 4.0, 5.0))
    ours = fastdet.FasterRCNN(Pyramid(), 5, settings=settings)
    with torch.device("meta"):
        made = fastdet.FasterRCNN(Pyramid(), 5, settings=settings)
    if not assign:
        made.to_empty(device="cpu")
        for buffer in made.buffers():
            assert not buffer.is_meta
    made.load_state_dict(ours.state_dict(), assign=assign)
    images = images_and_targets[0]
    with torch.no_grad():
        assert_same_detections(ours.eval()(images), made.eval()(images))
    for found, expected in zip(made.buffers(), ours.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_weights_that_a_call_or_parts_put_into_a_model_from_the_meta_device(images_and_targets):
    ours = fastdet.FasterRCNN(Pyramid(), 5, settings=both()[1].settings).eval()
    with torch.device("meta"):
        by_call, in_parts = (fastdet.FasterRCNN(Pyramid(), 5, settings=ours.settings).eval() for _ in range(2))
    for name, part in in_parts.named_children():
        part.load_state_dict(getattr(ours, name).state_dict(), assign=True)
    images = images_and_targets[0]
    with torch.no_grad():
        expected = ours(images)
        assert_same_detections(expected, torch.func.functional_call(by_call, dict(ours.state_dict()), (images,)))
        assert_same_detections(expected, in_parts(images))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_a_trace_is_refused_with_the_way_out(images_and_targets):
    ours = both()[1].eval()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep .* use fastdet\.export\.export_pt2"):
        torch.jit.trace(ours, (images_and_targets[0],), strict=False)


def test_arguments_after_the_classes_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        fastdet.FasterRCNN(Pyramid(), 5, 64)


def test_a_level_that_the_backbone_does_not_give_is_an_error(images_and_targets):
    ours = both()[1].eval()
    ours.settings = ours.settings.override(box_featmap_names=("0", "7"))
    with pytest.raises(ValueError, match=r"\['7'\] are not among the backbone's levels"):
        ours(images_and_targets[0])


def test_a_step_under_autocast_is_torchvisions(images_and_targets):
    """bf16 layers round to 3 digits, so that single proposals differ; the losses are means over all."""
    theirs, ours = both()
    images, targets = images_and_targets
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = theirs.train()(images, [dict(target) for target in targets]), ours.train()(images, targets)
    assert_same_losses({name: loss.float() for name, loss in expected.items()}, found, relative=0.03)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        detected = ours.eval()(images)
    assert all(each["boxes"].dtype == each["scores"].dtype == torch.float32 for each in detected)


def test_copies_and_pickles_detect_the_same(images_and_targets):
    ours, images = both()[1].eval(), images_and_targets[0]
    with torch.no_grad():
        expected = ours(images)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).double().float()):
            torch.testing.assert_close(copied(images), expected, rtol=0, atol=0)
