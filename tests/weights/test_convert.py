"""Weights in and out: strict loading, and the converters beside what the other libraries compute."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fastdet
from fastdet import boxes, weights
from fastdet.models.rpn import RegionProposalNetwork
from fastdet.structures import Batch
from fastdet.weights import files
from fastdet.weights.convert import WeightsError

SMALL = {"box_representation_size": 8, "rpn_hidden_channels": 8}


def small(num_classes=4, **settings):
    return fastdet.FasterRCNN("small", num_classes, **{**SMALL, **settings})


def frozen(num_classes=4):
    return small(num_classes, freeze_batchnorm=True)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def with_former_names(state):
    """The names of torchvision's detectors before version 0.13."""
    return {
        re.sub(r"(_blocks\.\d)\.0", r"\1", name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")): value
        for name, value in state.items()
    }


class PyramidOnly(torch.nn.Module):
    """A backbone that is torchvision's feature pyramid, for its names."""

    out_channels = 4

    def __init__(self):
        super().__init__()
        self.fpn = torchvision.ops.FeaturePyramidNetwork([3, 5], self.out_channels)


class OneConvolution(torch.nn.Module):
    """A head of the RPN whose present names are the former ones of torchvision's."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3)


def add_prefix(state):
    return {f"module.{name}": value for name, value in state.items()}


# Loading.


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_is_loaded(tmp_path, name):
    expected, model = copied(small()), small()
    assert not torch.equal(model.state_dict()["rpn.head.bbox_pred.weight"], expected["rpn.head.bbox_pred.weight"])
    files.write_state_dict(tmp_path / name, expected)
    weights.load(model, tmp_path / name)
    assert_same(model.state_dict(), expected)


def test_all_mismatches_are_listed_and_nothing_is_loaded():
    model, other = small(), copied(small())
    before = copied(model)
    for gone in ("backbone.0.0.weight", "rpn.head.conv.0.0.bias"):
        del other[gone]
    other |= {"extra.weight": torch.zeros(1), "backbone.9.0.weight": torch.zeros(1)}
    other["rpn.head.cls_logits.bias"] = torch.zeros(5)
    other["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, other)
    assert caught.value.missing == ["backbone.0.0.weight", "rpn.head.conv.0.0.bias"]
    assert caught.value.unexpected == ["extra.weight", "backbone.9.0.weight"]
    assert caught.value.misshapen == [
        ("rpn.head.cls_logits.bias", (5,), (18,)),
        ("roi_heads.box_predictor.cls_score.bias", (9,), (4,)),
    ]
    assert str(caught.value) == (
        "the state dict does not fit the model: 2 misshapen, 2 missing, 2 unexpected ("
        "rpn.head.cls_logits.bias is [5] in place of [18]; "
        "roi_heads.box_predictor.cls_score.bias is [9] in place of [4]; "
        "backbone.0.0.weight is missing; rpn.head.conv.0.0.bias is missing; extra.weight is unexpected; and 1 more)"
    )
    assert_same(model.state_dict(), before)


def test_the_message_names_the_file(tmp_path):
    path = tmp_path / "weights.pth"
    files.write_state_dict(path, {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match=f"^{re.escape(str(path))} does not fit the model: "):
        weights.load(small(), path)
    with pytest.raises(files.TensorFileError, match="no such file"):
        weights.load(small(), tmp_path / "other.pth")


@pytest.mark.parametrize(("state", "message"), [({}, "it is empty"), ({"a": 1}, "its entry 'a' is a int")])
def test_what_is_no_state_dict(state, message):
    with pytest.raises(WeightsError, match=f"the state dict is not one: {message}"):
        weights.load(small(), state)


@pytest.mark.parametrize(("theirs", "ours"), [(small, frozen), (frozen, small), (small, small)])
def test_frozen_batchnorm_has_no_count_of_steps(theirs, ours):
    """Loaded into a frozen one, the count is dropped; from a frozen one, the model's own stays."""
    state, model = copied(theirs()), ours()
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
    own = {name: value.clone() for name, value in model.state_dict().items() if name not in state}
    weights.load(model, state)
    expected = {name: state.get(name, own.get(name)) for name in model.state_dict()}
    assert_same(model.state_dict(), expected)
    assert all(value == 7 for value in own.values())


def test_a_count_of_steps_of_no_batchnorm_is_unexpected():
    state = {**copied(frozen()), "rpn.head.num_batches_tracked": torch.tensor(1)}
    with pytest.raises(WeightsError) as caught:
        weights.load(frozen(), state)
    assert caught.value.unexpected == ["rpn.head.num_batches_tracked"]
    del state["rpn.head.num_batches_tracked"], state["backbone.0.1.running_mean"]
    with pytest.raises(WeightsError) as caught:
        weights.load(small(), state)
    assert "backbone.0.1.running_mean" in caught.value.missing


def test_another_number_of_classes():
    model, state = small(4), copied(small(91))
    before = copied(model)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, state)
    assert str(caught.value).endswith(
        "; the weights have 91 classes, the model 4, the background included; "
        "replace_predictor=True loads all but the predictor"
    )
    assert len(caught.value.misshapen) == 4
    assert_same(model.state_dict(), before)
    weights.load(model, state, replace_predictor=True)
    predictor = {name: value for name, value in before.items() if name.startswith("roi_heads.box_predictor.")}
    assert len(predictor) == 4
    assert_same(model.state_dict(), {**state, **predictor})


def test_class_scores_that_are_one_number():
    state = {**copied(small(4)), "roi_heads.box_predictor.cls_score.weight": torch.tensor(1.0)}
    with pytest.raises(WeightsError, match=r"cls_score\.weight is \[\] in place of \[4, \d+\]\)$"):
        weights.load(small(4), state)


@pytest.mark.parametrize("change", [{"extra": torch.zeros(1)}, {"backbone.0.0.weight": None}])
def test_replacing_the_predictor_is_offered_only_where_it_helps(change):
    state = {name: value for name, value in {**copied(small(91)), **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=r"; the weights have 91 classes, the model 4, the background included$"):
        weights.load(small(4), state)


def test_replacing_the_predictor_hides_nothing_else():
    state = {**copied(small(91)), "rpn.head.cls_logits.bias": torch.zeros(5), "extra": torch.zeros(1)}
    del state["backbone.0.0.weight"]
    model = small(4)
    before = copied(model)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, state)
    assert "replace_predictor" not in str(caught.value)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, state, replace_predictor=True)
    assert caught.value.missing == ["backbone.0.0.weight"]
    assert caught.value.unexpected == ["extra"]
    assert caught.value.misshapen == [("rpn.head.cls_logits.bias", (5,), (18,))]
    assert_same(model.state_dict(), before)
    # With as many classes as the model, or with none at all, the model's own predictor stays as well.
    kept = {name: value for name, value in before.items() if "box_predictor" in name}
    same = copied(small(4))
    without = {name: value for name, value in same.items() if "box_predictor" not in name}
    for state in (same, without):
        weights.load(model, state, replace_predictor=True)
        assert_same(model.state_dict(), {**same, **kept})


def test_the_published_names_of_older_torchvision_are_accepted():
    """Its first detector on COCO was published under these names of the RPN and the pyramid."""
    with torch.device("meta"):
        theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    present = {name: value for name, value in theirs.state_dict().items() if "backbone.body" not in name}

    class Named(torch.nn.Module):
        """The model but for its ResNet, real and in two channels a tensor."""

        def __init__(self):
            super().__init__()
            self.rpn, self.backbone, self.roi_heads = theirs.rpn, torch.nn.Module(), theirs.roi_heads
            self.backbone.fpn = theirs.backbone.fpn

    model = Named()
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(len(value), 2))
    state = {name: torch.rand(len(value), 2) for name, value in present.items()}
    former = with_former_names(state)
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.3.bias"} <= set(former)
    assert len(set(former) - set(state)) == 18
    weights.load(model, former)
    assert_same(model.state_dict(), state)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, {**former, **state})
    assert sorted(caught.value.unexpected) == sorted(set(former) - set(state))


LOADERS = {
    "load_state_dict": lambda model, state: model.load_state_dict(state),
    "load_state_dict of a wrapper": lambda model, state: torch.nn.DataParallel(model).load_state_dict(
        add_prefix(state)
    ),
    "load": weights.load,
    "load with a wrapper's prefix": lambda model, state: weights.load(model, add_prefix(state)),
}


@pytest.mark.parametrize("way", LOADERS)
def test_former_names_of_torchvision_are_loaded(way):
    expected, model = (fastdet.FasterRCNN(PyramidOnly(), 4, **SMALL) for _ in range(2))
    former = with_former_names(copied(expected))
    names = list(former)
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.0.weight"} <= set(names)
    LOADERS[way](model, former)
    assert_same(model.state_dict(), expected.state_dict())
    assert list(former) == names, "the state dict that is given stays as it is"


@pytest.mark.parametrize("way", LOADERS)
def test_a_head_with_the_former_names_keeps_them(way):
    expected, model = (fastdet.FasterRCNN(PyramidOnly(), 4, rpn_head=OneConvolution(), **SMALL) for _ in range(2))
    assert "rpn.head.conv.weight" in expected.state_dict()
    LOADERS[way](model, copied(expected))
    assert_same(model.state_dict(), expected.state_dict())


def test_strict_loading_of_former_names():
    model = small()
    state, former = copied(model), with_former_names(copied(model))
    before = copied(model)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"rpn\.head\.conv\.(weight|bias)"'):
        model.load_state_dict({**state, **former})
    del former["rpn.head.conv.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"rpn\.head\.conv\.0\.0\.bias"'):
        model.load_state_dict(former)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, former)
    assert (caught.value.missing, caught.value.unexpected) == (["rpn.head.conv.0.0.bias"], [])
    keys = model.load_state_dict({name: value + 1 for name, value in former.items()}, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["rpn.head.conv.0.0.bias"], [])
    assert torch.equal(model.rpn.head.conv[0][0].weight, before["rpn.head.conv.0.0.weight"] + 1)


# simple-faster-rcnn-pytorch.


def simple_shapes(dropout=False, classes=21):
    """Every tensor of its FasterRCNNVGG16, written down from its layers."""
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    layers = {}
    for number, before, after in zip(numbers, (3, *widths), widths, strict=False):
        layers[f"extractor.{number}"] = (after, before, 3, 3)
    layers["rpn.conv1"] = (512, 512, 3, 3)
    layers["rpn.score"] = (18, 512, 1, 1)
    layers["rpn.loc"] = (36, 512, 1, 1)
    layers["head.classifier.0"] = (4096, 25088)
    layers["head.classifier.3" if dropout else "head.classifier.2"] = (4096, 4096)
    layers["head.cls_loc"] = (4 * classes, 4096)
    layers["head.score"] = (classes, 4096)
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def filled(shapes):
    """Random tensors of these names, with as many rows, and few values in each."""
    return {name: torch.randn(shape[0], 5) if len(shape) > 1 else torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def vgg16_shapes():
    with torch.device("meta"):
        model = fastdet.fasterrcnn_vgg16(21)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dropout", [False, True])
def test_simple_faster_rcnn_fills_the_whole_model(vgg16_shapes, dropout):
    theirs = simple_shapes(dropout)
    assert len(theirs) == 40
    converted = weights.from_simple_faster_rcnn({name: torch.empty(*s, device="meta") for name, s in theirs.items()})
    assert {name: tuple(value.shape) for name, value in converted.items()} == vgg16_shapes
    state = filled(theirs)
    assert_same(weights.to_simple_faster_rcnn(weights.from_simple_faster_rcnn(state), dropout=dropout), state)
    ours = filled(vgg16_shapes)
    assert_same(weights.from_simple_faster_rcnn(weights.to_simple_faster_rcnn(ours, dropout=dropout)), ours)


def test_simple_faster_rcnn_s_layers_keep_their_place():
    state = filled(simple_shapes())
    ours = weights.from_simple_faster_rcnn(state)
    for old, new in {
        "extractor.0": "backbone.0",
        "extractor.17": "backbone.17",
        "extractor.28": "backbone.28",
        "rpn.conv1": "rpn.head.conv.0.0",
        "rpn.score": "rpn.head.cls_logits",
        "head.classifier.0": "roi_heads.box_head.fc6",
        "head.classifier.2": "roi_heads.box_head.fc7",
        "head.score": "roi_heads.box_predictor.cls_score",
    }.items():
        for leaf in ("weight", "bias"):
            assert torch.equal(ours[f"{new}.{leaf}"], state[f"{old}.{leaf}"]), old


def decode_yx(reference, deltas):
    """Boxes (y1, x1, y2, x2) [N, 4] from deltas (dy, dx, dh, dw), as its loc2bbox defines them."""
    size = reference[:, 2:] - reference[:, :2]
    center = reference[:, :2] + size / 2 + deltas[:, :2] * size
    half = size * deltas[:, 2:].exp() / 2
    return torch.cat([center - half, center + half], dim=1)


def anchors_yx(height, width):
    """Its anchors (y1, x1, y2, x2): nine a cell, three sizes for the first ratio (height over width), and so on."""
    anchors = []
    for y in range(height):
        for x in range(width):
            for ratio in (0.5, 1.0, 2.0):
                for scale in (8, 16, 32):
                    h, w = 16 * scale * ratio**0.5, 16 * scale * ratio**-0.5
                    cy, cx = 16 * y + 8, 16 * x + 8
                    anchors.append([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2])
    return torch.tensor(anchors)


def test_simple_faster_rcnn_s_proposals_are_ours():
    state = filled(simple_shapes())
    for name in ("rpn.conv1", "rpn.score", "rpn.loc"):
        kernel = 3 if name == "rpn.conv1" else 1
        rows = 6 if name == "rpn.conv1" else len(state[f"{name}.weight"])
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(rows, 6, kernel, kernel) * 0.1, torch.randn(rows)
    features = torch.randn(1, 6, 3, 4)

    hidden = F.relu(F.conv2d(features, state["rpn.conv1.weight"], state["rpn.conv1.bias"], padding=1))
    deltas = F.conv2d(hidden, state["rpn.loc.weight"], state["rpn.loc.bias"]).permute(0, 2, 3, 1).reshape(-1, 4)
    logits = F.conv2d(hidden, state["rpn.score.weight"], state["rpn.score.bias"]).permute(0, 2, 3, 1).reshape(-1, 2)
    expected = decode_yx(anchors_yx(3, 4), deltas)

    ours = weights.from_simple_faster_rcnn(state)
    rpn = RegionProposalNetwork(6, fastdet.VGG16.override(rpn_hidden_channels=6))
    rpn.load_state_dict({name[4:]: value for name, value in ours.items() if name.startswith("rpn.")})
    batch = Batch(torch.zeros(1, 3, 48, 64), torch.tensor([[48, 64]]), torch.ones(1))
    with torch.no_grad():
        output = rpn([features], batch, return_intermediates=True)
    found = boxes.decode(output.deltas[0], output.anchors)
    torch.testing.assert_close(found[:, [1, 0, 3, 2]], expected, rtol=1e-5, atol=1e-2)
    assert (expected[:, [1, 0, 3, 2]] - expected).abs().min(0).values.max() > 0.1, "x and y are distinct"
    # The second of the two logits is the object's.
    torch.testing.assert_close(output.logits[0].softmax(-1)[:, 1], logits.softmax(-1)[:, 1])
    assert fastdet.VGG16.rpn_objectness == "softmax"


def test_simple_faster_rcnn_s_detections_are_ours():
    state, features = filled(simple_shapes()), torch.randn(7, 5)
    deltas = F.linear(features, state["head.cls_loc.weight"], state["head.cls_loc.bias"]).reshape(7, 21, 4)
    deltas = deltas * torch.tensor([0.1, 0.1, 0.2, 0.2])  # Its loc_normalize_std; the means are 0.
    corner, size = torch.rand(7, 2) * 100, torch.tensor([20.0, 60.0])
    rois = torch.cat([corner, corner + size], dim=1)
    expected = decode_yx(rois.repeat_interleave(21, 0), deltas.reshape(-1, 4)).reshape(7, 21, 4)

    ours = weights.from_simple_faster_rcnn(state)
    predictor = {name.rpartition("box_predictor.")[2]: value for name, value in ours.items() if "predictor" in name}
    found_deltas = F.linear(features, predictor["bbox_pred.weight"], predictor["bbox_pred.bias"]).reshape(7, 21, 4)
    found = boxes.decode(found_deltas, rois[:, None, [1, 0, 3, 2]], fastdet.VGG16.bbox_reg_weights)
    torch.testing.assert_close(found[..., [1, 0, 3, 2]], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["TORCH", "CAFFE"])
def test_simple_faster_rcnn_s_input_is_ours(kind):
    image = torch.rand(3, 30, 40)
    if kind == "TORCH":
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = (image - mean[:, None, None]) / std[:, None, None]
    else:
        expected = image[[2, 1, 0]] * 255 - torch.tensor([122.7717, 115.9465, 102.9801])[:, None, None]
    settings = getattr(weights, f"SIMPLE_FASTER_RCNN_{kind}_INPUT")
    model = small(min_size=30, max_size=40, **settings).eval()
    torch.testing.assert_close(model.inspect([image])["images"][0], expected)


# detectron2.


def detectron2_shapes(blocks=(3, 4, 6, 3), bottleneck=True, classes=80, anchors=3, counted=False):
    """Every tensor of its Faster R-CNN with FPN, written down from its layers."""
    shapes = {}

    def convolution(name, after, before, kernel):
        shapes[f"{name}.weight"] = (after, before, kernel, kernel)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{leaf}"] = (after,)
        if counted:
            shapes[f"{name}.norm.num_batches_tracked"] = ()

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    convolution("backbone.bottom_up.stem.conv1", 64, 3, 7)
    before = 64
    for stage, count in zip((2, 3, 4, 5), blocks, strict=True):
        inner = 64 * 2 ** (stage - 2)
        outer = 4 * inner if bottleneck else inner
        for block in range(count):
            name = f"backbone.bottom_up.res{stage}.{block}"
            if before != outer:
                convolution(f"{name}.shortcut", outer, before, 1)
            if bottleneck:
                convolution(f"{name}.conv1", inner, before, 1)
                convolution(f"{name}.conv2", inner, inner, 3)
                convolution(f"{name}.conv3", outer, inner, 1)
            else:
                convolution(f"{name}.conv1", inner, before, 3)
                convolution(f"{name}.conv2", inner, inner, 3)
            before = outer
        layer(f"backbone.fpn_lateral{stage}", 256, outer, 1, 1)
        layer(f"backbone.fpn_output{stage}", 256, 256, 3, 3)
    layer("proposal_generator.rpn_head.conv", 256, 256, 3, 3)
    layer("proposal_generator.rpn_head.objectness_logits", anchors, 256, 1, 1)
    layer("proposal_generator.rpn_head.anchor_deltas", 4 * anchors, 256, 1, 1)
    layer("roi_heads.box_head.fc1", 1024, 256 * 7 * 7)
    layer("roi_heads.box_head.fc2", 1024, 1024)
    layer("roi_heads.box_predictor.cls_score", classes + 1, 1024)
    layer("roi_heads.box_predictor.bbox_pred", 4 * classes, 1024)
    return shapes


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state, without="num_batches_tracked"):
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(without)}


def test_detectron2_fills_the_whole_of_torchvision_s_model():
    with torch.device("meta"):
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=81
        )
    converted = weights.from_detectron2(on_meta(detectron2_shapes()))
    assert {name: tuple(value.shape) for name, value in converted.items()} == shapes_of(model.state_dict())
    # With BatchNorm that is trained the counts come along.
    counted = weights.from_detectron2(on_meta(detectron2_shapes(counted=True)))
    assert shapes_of(counted, without="-") == shapes_of(model.state_dict(), without="-")


@pytest.mark.parametrize(
    ("name", "blocks", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        ("resnet34", (3, 4, 6, 3), False),
        ("resnet50", (3, 4, 6, 3), True),
        ("resnet101", (3, 4, 23, 3), True),
        ("resnet152", (3, 8, 36, 3), True),
    ],
)
def test_detectron2_s_other_resnets(name, blocks, bottleneck):
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(backbone_name=name, weights=None)
    converted = weights.from_detectron2(on_meta(detectron2_shapes(blocks, bottleneck)))
    found = {key: tuple(value.shape) for key, value in converted.items() if key.startswith("backbone.")}
    expected = {f"backbone.{key}": shape for key, shape in shapes_of(backbone.state_dict()).items()}
    assert found == expected


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("anchors", [3, 5])
def test_detectron2_there_and_back(anchors, counted):
    state = filled(detectron2_shapes(anchors=anchors, classes=6, counted=counted))
    ours = weights.from_detectron2(state)
    assert_same(weights.to_detectron2(ours), state)
    # Only the deltas of the background are lost, because nothing uses them: zeros are in their place.
    assert not ours["roi_heads.box_predictor.bbox_pred.weight"][:4].any()
    assert not ours["roi_heads.box_predictor.bbox_pred.bias"][:4].any()
    assert_same(weights.from_detectron2(weights.to_detectron2(ours)), ours)


def test_detectron2_s_layers_keep_their_place():
    state = filled(detectron2_shapes())
    ours = weights.from_detectron2(state)
    for old, new in {
        "backbone.bottom_up.stem.conv1.weight": "backbone.body.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_var": "backbone.body.bn1.running_var",
        "backbone.bottom_up.res2.0.shortcut.weight": "backbone.body.layer1.0.downsample.0.weight",
        "backbone.bottom_up.res2.0.shortcut.norm.bias": "backbone.body.layer1.0.downsample.1.bias",
        "backbone.bottom_up.res4.5.conv2.weight": "backbone.body.layer3.5.conv2.weight",
        "backbone.bottom_up.res5.2.conv3.norm.weight": "backbone.body.layer4.2.bn3.weight",
        "backbone.fpn_lateral2.weight": "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn_lateral5.bias": "backbone.fpn.inner_blocks.3.0.bias",
        "backbone.fpn_output3.weight": "backbone.fpn.layer_blocks.1.0.weight",
        "proposal_generator.rpn_head.conv.bias": "rpn.head.conv.0.0.bias",
        "proposal_generator.rpn_head.objectness_logits.bias": "rpn.head.cls_logits.bias",
        "proposal_generator.rpn_head.anchor_deltas.weight": "rpn.head.bbox_pred.weight",
        "roi_heads.box_head.fc1.weight": "roi_heads.box_head.fc6.weight",
        "roi_heads.box_head.fc2.bias": "roi_heads.box_head.fc7.bias",
    }.items():
        assert torch.equal(ours[new], state[old]), old


def test_detectron2_s_classes_are_ours():
    """Its class k of 0..K-1 is our label k + 1, its background K our 0; boxes of label k + 1 are its box k."""
    state, features = filled(detectron2_shapes(classes=6)), torch.randn(9, 5)
    predictor = "roi_heads.box_predictor"
    scores = F.linear(features, state[f"{predictor}.cls_score.weight"], state[f"{predictor}.cls_score.bias"])
    deltas = F.linear(features, state[f"{predictor}.bbox_pred.weight"], state[f"{predictor}.bbox_pred.bias"])
    ours = weights.from_detectron2(state)
    found = F.linear(features, ours[f"{predictor}.cls_score.weight"], ours[f"{predictor}.cls_score.bias"]).softmax(-1)
    found_deltas = F.linear(features, ours[f"{predictor}.bbox_pred.weight"], ours[f"{predictor}.bbox_pred.bias"])
    torch.testing.assert_close(found[:, 0], scores.softmax(-1)[:, 6])
    for k in range(6):
        torch.testing.assert_close(found[:, k + 1], scores.softmax(-1)[:, k])
        torch.testing.assert_close(found_deltas.reshape(9, 7, 4)[:, k + 1], deltas[:, 4 * k : 4 * k + 4])
    assert not found_deltas[:, :4].any()


def settings_of_old_checkpoints():
    cells = {}
    for level, side in enumerate((32, 64, 128, 256, 512)):
        half = torch.tensor([[side * ratio**-0.5, side * ratio**0.5] for ratio in (0.5, 1.0, 2.0)]) / 2
        cells[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = torch.cat([-half, half], dim=1)
    mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.ones(3)
    return {"pixel_mean": mean.reshape(3, 1, 1), "pixel_std": std.reshape(3, 1, 1), **cells}


def test_detectron2_s_settings_are_checked_and_left_out(tmp_path):
    state, settings = filled(detectron2_shapes()), settings_of_old_checkpoints()
    assert_same(weights.from_detectron2({**settings, **state}), weights.from_detectron2(state))
    assert_same(weights.from_detectron2({"pixel_std": settings["pixel_std"], **state}), weights.from_detectron2(state))
    rgb = {"pixel_mean": torch.tensor([123.675, 116.28, 103.53]), "pixel_std": torch.tensor([58.395, 57.12, 57.375])}
    with pytest.raises(WeightsError, match=r"a pixel_mean of \(123\.675, 116\.28, 103\.53\), not \(103"):
        weights.from_detectron2({**settings, **state, **rgb})
    with pytest.raises(WeightsError, match=r"a pixel_std of \(58\.395, .*as image_std, and from_detectron2 as pixel"):
        weights.from_detectron2({**settings, **state, "pixel_std": rgb["pixel_std"]})
    given = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
    assert_same(weights.from_detectron2({**settings, **state, **rgb}, **given), weights.from_detectron2(state))
    settings["proposal_generator.anchor_generator.cell_anchors.2"][1] *= 2
    with pytest.raises(WeightsError, match=r"2 sizes a level .*cell_anchors\.2 .*not 1.*sizes_per_level"):
        weights.from_detectron2({**settings, **state})


def test_anchors_of_several_sizes_a_level_keep_their_weights():
    """detectron2 lists a cell's anchors size by size, fastdet ratio by ratio: each takes its rows along."""
    sizes, ratios = (32.0, 40.0), (0.5, 1.0, 2.0)
    theirs = [(size, ratio) for size in sizes for ratio in ratios]
    generator = fastdet.AnchorGenerator((sizes,), (ratios,))
    ours = [(float((w * h) ** 0.5), float(h / w)) for w, h in generator.cell_anchors()[0][:, 2:] * 2]
    order = [min(range(6), key=lambda k: abs(theirs[k][0] - a) + abs(theirs[k][1] - b)) for a, b in ours]
    assert sorted(order) == list(range(6)) != order
    state = filled(detectron2_shapes(anchors=6))
    found = weights.from_detectron2(state, sizes_per_level=2)
    for kind, theirs_name, ours_name, values in (
        ("weight", "objectness_logits", "cls_logits", 1),
        ("bias", "objectness_logits", "cls_logits", 1),
        ("weight", "anchor_deltas", "bbox_pred", 4),
        ("bias", "anchor_deltas", "bbox_pred", 4),
    ):
        rows = state[f"proposal_generator.rpn_head.{theirs_name}.{kind}"].unflatten(0, (6, values))
        assert torch.equal(found[f"rpn.head.{ours_name}.{kind}"], rows[order].flatten(0, 1))
    assert_same(weights.to_detectron2(found, sizes_per_level=2), state)
    with pytest.raises(WeightsError, match=r"6 anchors of a cell .* sizes_per_level=4"):
        weights.from_detectron2(state, sizes_per_level=4)


def test_the_builder_passes_on_how_many_sizes_a_level_has(tmp_path):
    state, settings = filled(detectron2_shapes(anchors=6)), settings_of_old_checkpoints()
    cells = {name: torch.cat([value, value * 1.25]) for name, value in settings.items() if "cell_anchors" in name}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in {**state, **cells}.items()}}))
    with pytest.raises(WeightsError, match=r"anchors of 2 sizes a level .*, not 1"):
        fastdet.fasterrcnn_resnet50_fpn_detectron2(weights=path)
    anchors = AnchorGenerator(((32, 40), (64, 80), (128, 160), (256, 320), (512, 640)), ((0.5, 1.0, 2.0),) * 5)
    with pytest.raises(WeightsError, match=r"misshapen \(backbone"):
        fastdet.fasterrcnn_resnet50_fpn_detectron2(weights=path, rpn_anchor_generator=anchors)


def test_a_file_of_detectron2_s_zoo_is_read(tmp_path):
    state = {**filled(detectron2_shapes(classes=3)), **settings_of_old_checkpoints()}
    content = {"model": {name: value.numpy() for name, value in state.items()}, "__author__": "Detectron2 Model Zoo"}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content))
    found = weights.from_detectron2(files.read_state_dict(path))
    assert_same(found, weights.from_detectron2(state))


# What does not fit a converter.

TO_OURS = {
    "simple": (weights.from_simple_faster_rcnn, lambda: filled(simple_shapes())),
    "detectron2": (weights.from_detectron2, lambda: filled(detectron2_shapes())),
}
FROM_OURS = {
    "to simple": (
        weights.to_simple_faster_rcnn,
        lambda: weights.from_simple_faster_rcnn(filled(simple_shapes())),
    ),
    "to detectron2": (weights.to_detectron2, lambda: weights.from_detectron2(filled(detectron2_shapes()))),
}


@pytest.mark.parametrize("kind", [*TO_OURS, *FROM_OURS])
def test_every_missing_or_unexpected_name_is_reported(kind):
    convert, make = {**TO_OURS, **FROM_OURS}[kind]
    state = make()
    for name in state:
        with pytest.raises(WeightsError) as caught:
            convert({key: value for key, value in state.items() if key != name})
        assert caught.value.missing == [name]
        assert not caught.value.unexpected
        other = name.rpartition(".")[0] + ".other"
        with pytest.raises(WeightsError) as caught:
            convert({**state, other: torch.zeros(1)})
        assert caught.value.unexpected == [other]
    before = set(state)
    convert(state)
    assert set(state) == before, "the state dict that is given stays as it is"


def test_a_block_that_is_missing_altogether_is_reported():
    state = filled(detectron2_shapes())
    gone = [name for name in state if ".res4.5." in name]
    assert len(gone) == 15
    with pytest.raises(WeightsError) as caught:
        weights.from_detectron2({name: value for name, value in state.items() if name not in gone})
    assert sorted(caught.value.missing) == sorted(gone)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("simple", {"rpn.loc.bias": 18}, [("rpn.loc.bias", (18,), (36,))]),
        ("simple", {"rpn.score.bias": 9}, [("rpn.score.bias", (9,), (18,))]),
        ("simple", {"head.cls_loc.bias": 80}, [("head.cls_loc.bias", (80,), (84,))]),
        ("simple", {"head.score.bias": 20}, [("head.score.bias", (20,), (21,))]),
        ("to simple", {"rpn.head.bbox_pred.bias": 35}, [("rpn.head.bbox_pred.bias", (35,), (36,))]),
        (
            "detectron2",
            {"roi_heads.box_predictor.bbox_pred.bias": 324},
            [("roi_heads.box_predictor.bbox_pred.bias", (324,), (320,))],
        ),
        (
            "detectron2",
            {"proposal_generator.rpn_head.anchor_deltas.bias": 60},
            [("proposal_generator.rpn_head.anchor_deltas.bias", (60,), (12,))],
        ),
        (
            "to detectron2",
            {"roi_heads.box_predictor.bbox_pred.bias": 320},
            [("roi_heads.box_predictor.bbox_pred.bias", (320,), (324,))],
        ),
    ],
)
def test_numbers_of_rows_that_contradict_each_other_are_reported(kind, changes, expected):
    convert, make = {**TO_OURS, **FROM_OURS}[kind]
    with pytest.raises(WeightsError, match="1 misshapen") as caught:
        convert({**make(), **{name: torch.zeros(rows) for name, rows in changes.items()}})
    assert caught.value.misshapen == expected


def test_class_agnostic_boxes_are_reported():
    """detectron2's CLS_AGNOSTIC_BBOX_REG."""
    state = filled(detectron2_shapes())
    name = "roi_heads.box_predictor.bbox_pred"
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.zeros(4, 5), torch.zeros(4)
    with pytest.raises(WeightsError) as caught:
        weights.from_detectron2(state)
    assert [found for found, _, _ in caught.value.misshapen] == [f"{name}.weight", f"{name}.bias"]


@pytest.mark.parametrize("kind", TO_OURS)
def test_weights_of_others_that_are_not_converted_are_recognized(kind):
    convert, make = TO_OURS[kind]
    with pytest.raises(WeightsError, match=f"fastdet.weights.{convert.__name__} converts such names$"):
        weights.load(small(), make())


def test_converted_weights_are_loaded():
    """Names and shapes alone, on the meta device: the model is large."""
    with torch.device("meta"):
        model = fastdet.fasterrcnn_vgg16(21)
    state = weights.from_simple_faster_rcnn({k: torch.empty(*s, device="meta") for k, s in simple_shapes().items()})
    weights.load(model, state)
    other = weights.from_simple_faster_rcnn(
        {k: torch.empty(*s, device="meta") for k, s in simple_shapes(classes=3).items()}
    )
    with pytest.raises(WeightsError, match="the weights have 3 classes, the model 21"):
        weights.load(model, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to_sparse(), "is torch.sparse_coo, not a plain tensor"),
        (lambda value: value.to("meta"), "1.weight is on the meta device, without content"),
        (lambda value: value > 0, "holds torch.bool in place of torch.float32"),
        (lambda value: value.to(torch.complex64), "holds torch.complex64 in place of torch.float32"),
    ],
)
def test_tensors_of_another_kind_are_refused_before_anything_is_loaded(change, words):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.full_like(value, 9) for name, value in before.items()}
    state["1.weight"] = change(state["1.weight"])
    with pytest.raises(WeightsError, match=words):
        weights.load(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off_mappings_too(prefix):
    model = torch.nn.Linear(2, 3)
    weights.load(model, {f"{prefix}{name}": torch.full_like(value, 9) for name, value in model.state_dict().items()})
    assert (model.weight == 9).all()
