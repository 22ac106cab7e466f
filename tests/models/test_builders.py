"""The detectors by name: with torchvision's state dicts they give torchvision's outputs."""

import inspect
import re
import urllib.error
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import fastdet
from fastdet.models import backbones
from tests.helpers.parity import (
    EVERYTHING,
    assert_same_detections,
    assert_same_losses,
    sample_all_candidates,
    scene,
)
from tests.helpers.weights import calibrate_batchnorm, randomize_heads, rescale_heads

BUILDERS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
SMALL = {
    "min_size": 128,
    "max_size": 192,
    "num_classes": 5,
    "weights_backbone": None,
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 60,
}


@pytest.fixture(scope="module")
def images_and_targets():
    """Limited by the shorter and by the longer side; the second has no boxes."""
    return scene((128, 160), (96, 70), (60, 200))


@pytest.fixture(scope="module", params=BUILDERS)
def pair(request, images_and_targets):
    """torchvision's detector and ours, from one state dict."""
    torch.manual_seed(0)
    theirs = getattr(detection, request.param)(weights=None, **SMALL)
    images = images_and_targets[0]
    batch = torch.stack([nn.functional.interpolate(image[None], (128, 192))[0] for image in images])
    calibrate_batchnorm(theirs, lambda: theirs.backbone(batch))
    rescale_heads(theirs, images)
    sample_all_candidates(theirs)
    everything = {**EVERYTHING, "box_batch_size_per_image": 120}
    ours = getattr(fastdet, request.param)(weights=None, **SMALL, **everything)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_detections_are_torchvisions(pair, images_and_targets):
    theirs, ours = (model.eval() for model in pair)
    with torch.no_grad():
        expected, found = theirs(images_and_targets[0]), ours(images_and_targets[0])
    assert_same_detections(expected, found, pixels=0.05, scores=1e-4)


def test_losses_are_torchvisions(pair, images_and_targets):
    theirs, ours = (model.train() for model in pair)
    # In another layout convolutions round otherwise, and a proposal or sample at a threshold goes the other way.
    theirs.to(memory_format=torch.channels_last)
    images, targets = images_and_targets
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    with torch.no_grad():
        expected, found = theirs(images, [dict(target) for target in targets]), ours(images, targets)
    for model in pair:
        model.load_state_dict(before)
    assert_same_losses(expected, found)


def test_names_and_shapes_of_parameters_are_torchvisions(pair):
    theirs, ours = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for expected, found in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (expected[0], expected[1].shape) == (found[0], found[1].shape)


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_have_torchvisions_signatures(name):
    theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (detection, fastdet))
    for key, parameter in theirs.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert ours[key].default == parameter.default, key
            assert ours[key].kind is parameter.kind


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder where torchvision looks for files before it fetches them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def save_checkpoint(folder, weights, state):
    torch.save(state, folder / weights.url.rsplit("/", 1)[1])


def frozen_parameters(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("trainable", [None, 1])
def test_named_weights_come_through_torchvisions_enums(hub, name, trainable):
    weights = detection.__dict__[{v.lower(): v for v in dir(detection)}[name + "_weights"]].COCO_V1
    torch.manual_seed(1)
    save_checkpoint(hub, weights, getattr(detection, name)(weights=None, weights_backbone=None).state_dict())
    theirs = getattr(detection, name)(weights=weights, trainable_backbone_layers=trainable)
    for given in (weights, "COCO_V1"):
        ours = getattr(fastdet, name)(weights=given, trainable_backbone_layers=trainable)
        assert ours.num_classes == 91
        assert frozen_parameters(ours) == frozen_parameters(theirs)
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
        norms = [[m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)] for model in (theirs, ours)]
        assert [norm.eps for norm in norms[0]] == [norm.eps for norm in norms[1]]


def test_the_names_of_older_files_are_converted(pair, tmp_path):
    """torchvision's file of 2019 calls the convolutions of the pyramid and of the RPN by shorter names."""
    theirs, ours = pair
    state = theirs.state_dict()
    if "rpn.head.conv.1.0.weight" in state or "backbone.fpn.inner_blocks.0.1.weight" in state:
        pytest.skip("never had other names")
    former = {
        name.replace("conv.0.0.", "conv.").replace("blocks.0.0.", "blocks.0."): value * 2
        for name, value in state.items()
    }
    former = {re.sub(r"(blocks\.\d)\.0\.", r"\1.", name): value for name, value in former.items()}
    assert "rpn.head.conv.weight" in former
    assert "backbone.fpn.layer_blocks.1.bias" in former
    torch.save(former, tmp_path / "old.pth")
    try:
        for load in (ours.load_state_dict, lambda state: fastdet.weights.load(ours, tmp_path / "old.pth")):
            ours.load_state_dict(state)
            load(dict(former))
            assert all(torch.equal(value, state[name] * 2) for name, value in ours.state_dict().items())
    finally:
        ours.load_state_dict(state)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_named_weights_of_the_backbone(hub, name):
    network = {"fasterrcnn_resnet50_fpn": "resnet50"}.get(name, "mobilenet_v3_large")
    weights = torchvision.models.get_model_weights(network)
    torch.manual_seed(1)
    save_checkpoint(hub, weights.IMAGENET1K_V1, torchvision.models.get_model(network).state_dict())
    theirs = getattr(detection, name)(weights_backbone=weights.IMAGENET1K_V1, num_classes=4)
    for given in (weights.IMAGENET1K_V1, "IMAGENET1K_V1"):
        ours = getattr(fastdet, name)(weights_backbone=given, num_classes=4)
        assert frozen_parameters(ours) == frozen_parameters(theirs)
        state = theirs.state_dict()
        for key, value in ours.state_dict().items():
            assert "body" not in key or torch.equal(value, state[key]), key
        assert list(ours.state_dict()) == list(state)


def test_without_weights_everything_trains():
    model = fastdet.fasterrcnn_mobilenet_v3_large_fpn(weights_backbone=None, num_classes=3)
    assert not frozen_parameters(model)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_another_number_of_classes_is_refused_or_replaced(tmp_path):
    torch.manual_seed(2)
    path = tmp_path / "coco.pth"
    coco = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save(coco, path)
    build = fastdet.fasterrcnn_mobilenet_v3_large_fpn
    assert build(weights=path).num_classes == 91
    with pytest.raises(ValueError, match=r"coco\.pth.*91.*4.*replace_predictor"):
        build(weights=path, num_classes=4)
    model = build(weights=path, num_classes=4, replace_predictor=True)
    for name, value in model.state_dict().items():
        assert "box_predictor" in name or torch.equal(value, coco[name]), name
    assert model.num_classes == 4
    model.roi_heads.box_predictor = FastRCNNPredictor(1024, 7)
    assert model.num_classes == 7, "as torchvision's users replace it by hand"
    with pytest.raises(ValueError, match=r"label outside 1\.\.6"):
        model([torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([7])}])


def test_files_that_are_no_weights_of_this_detector(tmp_path):
    def saved(name, content):
        path = tmp_path / name
        torch.save(content, path)
        return path

    build = fastdet.fasterrcnn_mobilenet_v3_large_fpn
    other = torchvision.models.mobilenet_v2().state_dict()
    whole = saved("whole.pth", build(weights_backbone=None, num_classes=3).state_dict())
    (tmp_path / "short.pth").write_bytes(whole.read_bytes()[:5000])
    for path, words in (
        (
            saved("other.pth", {"model": other}),
            r"other\.pth does not fit the model: \d+ missing, \d+ unexpected \((.*; ){5}",
        ),
        (saved("list.pth", [1, 2]), r"list\.pth"),
        (saved("numbers.pth", {"a": 1}), r"numbers\.pth"),
        (tmp_path / "short.pth", r"short\.pth"),
        (tmp_path / "none.pth", r"none\.pth"),
    ):
        with pytest.raises(ValueError, match=words):
            build(weights=path, num_classes=3)
        with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
            fastdet.fasterrcnn_resnet50_fpn_detectron2(weights=path)


def test_detectron2s_detector(tmp_path):
    torch.manual_seed(5)
    model = fastdet.fasterrcnn_resnet50_fpn_detectron2(num_classes=4)
    calibrated = {k: v + 0.1 * torch.rand_like(v) if "running" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(calibrated)
    torch.save({"model": fastdet.weights.to_detectron2(model.state_dict())}, tmp_path / "model_final.pth")
    again = fastdet.fasterrcnn_resnet50_fpn_detectron2(weights=tmp_path / "model_final.pth")
    assert again.num_classes == 4
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in again.modules())
    state = again.state_dict()
    for name, value in model.state_dict().items():
        if name in state and not name.startswith("roi_heads.box_predictor.bbox_pred"):
            assert torch.equal(state[name], value), name
    box = "roi_heads.box_predictor.bbox_pred.weight"
    assert torch.equal(state[box][4:], model.state_dict()[box][4:])
    assert again.backbone.body.layer2[0].conv1.stride == (2, 2)
    assert fastdet.fasterrcnn_resnet50_fpn_detectron2(stride_in_1x1=False).backbone.body.layer2[0].conv2.stride == (
        2,
        2,
    )
    old = {**fastdet.weights.to_detectron2(model.state_dict()), "pixel_mean": torch.tensor([1.0, 2, 3])[:, None, None]}
    torch.save({"model": old}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"old\.pth.*pixel_mean of \(1.0, 2.0, 3.0\)"):
        fastdet.fasterrcnn_resnet50_fpn_detectron2(weights=tmp_path / "old.pth")
    fastdet.fasterrcnn_resnet50_fpn_detectron2(weights=tmp_path / "old.pth", image_mean=(1.0, 2.0, 3.0))
    settings = again.settings
    assert (settings.box_aligned, settings.box_sampling_ratio, settings.rpn_smooth_l1_beta) == (True, 0, 0)
    inspected = again.eval().inspect([torch.rand(3, 100, 128)])
    assert inspected["images"].max() > 50, "0..255"
    assert inspected["anchors"][0].tolist() == pytest.approx([-22.6274, -11.3137, 22.6274, 11.3137], abs=1e-3)


def test_detectron2s_rows_are_permuted_for_the_anchors_of_the_model(tmp_path):
    """In whichever way these are given; torchvision's None stands for the default."""
    build = fastdet.fasterrcnn_resnet50_fpn_detectron2
    sizes = tuple((side, 1.5 * side) for side in (32, 64, 128, 256, 512))
    several = replace(fastdet.DETECTRON2.rpn_anchor_generator, sizes=sizes)
    settings = fastdet.DETECTRON2.override(rpn_anchor_generator=several)
    theirs = TheirAnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    for count, ways in (
        (2, ({"settings": settings}, {"rpn_anchor_generator": several}, {"rpn_anchor_generator": theirs})),
        (1, ({"rpn_anchor_generator": None, "image_mean": None},)),
    ):
        model = build(num_classes=4, **ways[0])
        state = fastdet.weights.to_detectron2(model.state_dict(), sizes_per_level=count)
        torch.save(state, tmp_path / "model.pth")
        for given in ways:
            again = build(weights=tmp_path / "model.pth", **given)
            assert torch.equal(again.rpn.head.bbox_pred.weight, model.rpn.head.bbox_pred.weight), given


def test_new_predictors_are_initialized_as_in_the_reference_library():
    torch.manual_seed(6)
    ours, paper = (
        fastdet.FasterRCNN(name, 50).roi_heads.box_predictor for name in ("mobilenet_v2_fpn", "mobilenet_v2")
    )
    theirs = FastRCNNPredictor(256, 50)

    def deviations(predictor):
        return [layer.weight.detach().std().item() for layer in (predictor.cls_score, predictor.bbox_pred)]

    assert deviations(ours) == pytest.approx(deviations(theirs), rel=0.1)
    assert deviations(paper) == pytest.approx([0.01, 0.001], rel=0.1)
    assert not paper.bbox_pred.bias.any()


def test_torchvisions_objects_are_accepted():
    """The constructor call of a torchvision user, with one import changed."""

    def build(cls):
        torch.manual_seed(3)
        body = torchvision.models.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[:18]
        backbone = BackboneWithFPN(
            body, {"6": "0", "13": "1", "17": "2"}, [32, 96, 320], 128, extra_blocks=LastLevelMaxPool()
        )
        return cls(
            backbone,
            None,
            min_size=128,
            max_size=192,
            rpn_anchor_generator=TheirAnchorGenerator(((24,), (48,), (96,), (192,)), ((0.5, 1.0, 2.0),) * 4),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
            rpn_post_nms_top_n_test=100,
            box_head=TwoMLPHead(128 * 49, 256),
            box_predictor=FastRCNNPredictor(256, 4),
        )

    theirs, ours = build(detection.FasterRCNN), build(fastdet.FasterRCNN)
    assert ours.num_classes == 4
    randomize_heads(theirs, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    images, _ = scene((128, 160), (96, 70))
    with torch.no_grad():
        assert_same_detections(theirs.eval()(images), ours.eval()(images))
    by_name = fastdet.FasterRCNN("mobilenet_v2_fpn", 4, freeze_batchnorm=True)
    assert list(by_name.state_dict()) == list(theirs.state_dict())
    with pytest.raises(ValueError, match=r"num_classes is 3, but box_predictor has 4"):
        fastdet.FasterRCNN("small", 3, box_predictor=FastRCNNPredictor(256, 4))


def test_a_backbone_without_a_pyramid_as_torchvisions_users_build_it():
    def build(cls):
        torch.manual_seed(3)
        backbone = torchvision.models.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features
        backbone.out_channels = 1280
        anchors = TheirAnchorGenerator(sizes=((16, 32, 64, 128, 256),), aspect_ratios=((0.5, 1.0, 2.0),))
        pool = MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2)
        settings = {"min_size": 128, "max_size": 192, "rpn_post_nms_top_n_test": 50}
        return cls(backbone, num_classes=2, rpn_anchor_generator=anchors, box_roi_pool=pool, **settings)

    theirs, ours = build(detection.FasterRCNN), build(fastdet.FasterRCNN)
    randomize_heads(theirs, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    images, _ = scene((128, 160), (96, 70))
    with torch.no_grad():
        assert_same_detections(theirs.eval()(images), ours.eval()(images))


def test_weights_of_another_network_are_refused(hub):
    other = torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1
    for call in (
        lambda: fastdet.fasterrcnn_resnet50_fpn(weights_backbone=other),
        lambda: fastdet.FasterRCNN("resnet50_fpn", 3, weights_backbone=other),
        lambda: fastdet.fasterrcnn_resnet50_fpn(weights=detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1),
    ):
        with pytest.raises(ValueError, match="are weights of another network"):
            call()
    with pytest.raises(ValueError, match="weights: no file 'COCO_V2', and not one of COCO_V1, DEFAULT"):
        fastdet.fasterrcnn_resnet50_fpn(weights="COCO_V2")
    with pytest.raises(ValueError, match="replace_predictor is for weights to be loaded"):
        fastdet.fasterrcnn_mobilenet_v3_large_fpn(weights_backbone=None, replace_predictor=True)


@pytest.mark.parametrize("written", ["enum", "IMAGENET1K_V1", "DEFAULT", "MobileNet_V2_Weights.IMAGENET1K_V1"])
def test_every_way_to_name_weights(hub, written):
    enum = torchvision.models.MobileNet_V2_Weights
    state = torchvision.models.mobilenet_v2().state_dict()
    for member in enum:
        save_checkpoint(hub, member, state)
    given = enum.IMAGENET1K_V1 if written == "enum" else written
    model = fastdet.FasterRCNN("mobilenet_v2_fpn", 3, weights_backbone=given)
    assert torch.equal(model.backbone.body["0"][0].weight, state["features.0.0.weight"])


def test_torchvisions_none_means_the_default():
    nothing = {"rpn_anchor_generator": None, "image_mean": None, "image_std": None, "bbox_reg_weights": None}
    model = fastdet.FasterRCNN("mobilenet_v2_fpn", 3, **nothing)
    assert model.settings == fastdet.FasterRCNN("mobilenet_v2_fpn", 3).settings


def test_anchors_of_a_subclass_are_refused():
    class Subclass(TheirAnchorGenerator):
        pass

    with pytest.raises(ValueError, match=r"rpn_anchor_generator .* got Subclass"):
        fastdet.FasterRCNN("small", 3, rpn_anchor_generator=Subclass())


def test_pooling_without_equivalent_settings_is_refused():
    class Subclass(MultiScaleRoIAlign):
        pass

    for pool, words in (
        (Subclass(["0"], 7, 2), "got Subclass"),
        (MultiScaleRoIAlign(["0"], (7, 5), 2), "7 x 5"),
        (MultiScaleRoIAlign(["0"], 7, 2, canonical_scale=112), r"\(112, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            fastdet.FasterRCNN("small", 3, box_roi_pool=pool)


@pytest.mark.parametrize("name", [name for name in backbones.NAMED if name != "vgg16"])
def test_every_backbone_gives_the_levels_of_its_entry(name):
    named = backbones.NAMED[name]
    backbone, _ = backbones.build(name)
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, 3, 64, 128))
    levels = list(features.values()) if isinstance(features, dict) else [features]
    assert [128 // level.shape[-1] for level in levels] == list(named.strides)
    assert all(level.shape[1] == backbone.out_channels for level in levels)
    assert len(named.settings.rpn_anchor_generator.sizes) == len(named.strides)


@pytest.mark.parametrize(
    "name", ["small", "mobilenet_v2", "mobilenet_v2_fpn", "mobilenet_v3_large_fpn", "resnet18_fpn"]
)
def test_backbones_train_and_detect(name):
    torch.manual_seed(4)
    images, targets = scene((64, 96), (64, 64), classes=3)
    settings = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20}
    model = fastdet.FasterRCNN(name, 3, **settings)
    sum(model(images, targets).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert len(model.eval()(images)) == 2


def test_bottlenecks_can_stride_first():
    backbone, _ = backbones.build("resnet50_fpn")
    first = backbone.body.layer2[0]
    assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))
    backbones.move_stride_to_first_convolution(backbone)
    assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))
    assert (backbone.body.layer2[1].conv1.stride, backbone.body.layer1[0].conv1.stride) == ((1, 1), (1, 1))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(
        ValueError, match=r"weights_backbone: MobileNet_V2.*cannot be downloaded from https.*a file of it"
    ):
        fastdet.FasterRCNN("mobilenet_v2", 3, weights_backbone="IMAGENET1K_V1")
