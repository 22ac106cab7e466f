import copy
import dataclasses
import pickle

import pytest
import torch
import torchvision
from torch import nn

import fastdet
from fastdet.models.layers import MaskedBatchNorm2d
from fastdet.models.preprocessing import resized_size, unbatch
from fastdet.models.rpn import RPNHead
from fastdet.structures import Batch, Proposals
from tests.helpers.detectors import NUM_CLASSES, TinyBackbone, small_detector, small_scene

LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture(scope="module")
def vgg16():
    torch.manual_seed(0)
    return fastdet.fasterrcnn_vgg16().train()


@pytest.fixture(scope="module")
def photograph():
    image = torch.rand(3, 600, 901, generator=torch.Generator().manual_seed(3))
    boxes = torch.tensor([[100.0, 120, 400, 420], [500, 50, 860, 560]])
    return image, {"boxes": boxes, "labels": torch.tensor([12, 20])}


def test_the_shapes_of_vgg16_in_training(vgg16, photograph):
    image, target = photograph
    with torch.no_grad():
        inspected = vgg16.train().inspect([image], [target])
    assert inspected["images"].shape == (1, 3, 600, 901)
    assert inspected["features"].shape == (1, 512, 37, 56)
    assert inspected["anchors"].shape == (18648, 4)
    assert int(inspected["anchors_inside"].sum()) == 6928
    assert inspected["rpn_deltas"].shape == (1, 18648, 4)
    assert inspected["rpn_logits"].shape == (1, 18648, 2)
    assert inspected["proposals"].boxes.shape == (1, 2000, 4)
    labels = inspected["anchor_labels"]
    assert int((labels >= 0).sum()) == 256
    assert 1 <= int((labels == 1).sum()) <= 128
    assert (labels[~inspected["anchors_inside"]] == -1).all()
    assert (inspected["anchor_deltas"][~inspected["anchors_inside"]] == 0).all()
    samples = inspected["samples"]
    assert samples.boxes.shape == (1, 128, 4)
    # An untrained RPN proposes too few boxes that overlap something to fill every slot.
    positive = (samples.labels > 0) & (samples.weight > 0)
    assert 2 <= int(positive.sum()) <= 32, "the ground truth itself is among the positives"
    assert inspected["pooled"].shape == (1, 128, 512, 7, 7)
    assert inspected["box_deltas"].shape == (1, 128, 84)
    assert inspected["class_logits"].shape == (1, 128, 21)
    assert set(inspected["losses"]) == LOSSES


def test_the_shapes_of_vgg16_in_evaluation(vgg16, photograph):
    with torch.no_grad():
        inspected = vgg16.eval().inspect([photograph[0]])
    assert inspected["proposals"].boxes.shape == (1, 300, 4)
    assert int(inspected["proposals"].count[0]) == 300
    assert inspected["box_deltas"].shape == (1, 300, 84)
    assert inspected["class_logits"].shape == (1, 300, 21)
    assert inspected["detections"].boxes.shape == (1, 300 * 20, 4)
    assert inspected["detections"].scores.shape == (1, 300 * 20)


def test_vgg16_takes_its_layers_and_the_classifiers_weights_from_torchvision(tmp_path):
    torch.manual_seed(1)
    classifier = torchvision.models.vgg16()
    torch.save(classifier.state_dict(), tmp_path / "vgg16.pth")
    model = fastdet.fasterrcnn_vgg16(weights_backbone=tmp_path / "vgg16.pth")
    state = model.state_dict()
    assert torch.equal(state["backbone.28.weight"], classifier.features[28].weight)
    assert torch.equal(state["roi_heads.box_head.fc6.weight"], classifier.classifier[0].weight)
    assert torch.equal(state["roi_heads.box_head.fc7.bias"], classifier.classifier[3].bias)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    expected = [f"backbone.{i}.{kind}" for i in (0, 2, 5, 7) for kind in ("weight", "bias")]
    assert frozen == expected, "conv1 and conv2"
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    again = fastdet.fasterrcnn_vgg16(weights=tmp_path / "detector.pth", weights_backbone="not read")
    assert [name for name, parameter in again.named_parameters() if not parameter.requires_grad] == expected
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())


def test_mobilenet_is_cut_at_stride_16_and_its_pretrained_batchnorm_is_frozen(tmp_path):
    features = torchvision.models.mobilenet_v2().features
    torch.save(features.state_dict(), tmp_path / "features.pth")
    scratch = fastdet.FasterRCNN("mobilenet_v2", 3, min_size=64, max_size=96)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in scratch.modules())
    assert all(parameter.requires_grad for parameter in scratch.parameters())
    model = fastdet.FasterRCNN("mobilenet_v2", 3, weights_backbone=tmp_path / "features.pth", min_size=64, max_size=96)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    image = torch.rand(1, 3, 64, 96)
    expected = features.eval()[:14](image)
    assert expected.shape == (1, 96, 4, 6)
    torch.testing.assert_close(model.backbone(image), expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"features.0.weight": torch.zeros(3)},
            r"1 misshapen, 25 missing \(0.weight is \[3\] in place of \[64, 3, 3, 3\]",
        ),
        ({"layer1.conv.weight": torch.zeros(3)}, "not a state dict of vgg16: it holds 'layer1.conv.weight'"),
        ([1, 2], "file.pth.* a list"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=words):
        fastdet.FasterRCNN("vgg16", 3, weights_backbone=tmp_path / "file.pth")


def test_weights_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"no file 'nowhere\.pth', and not one of IMAGENET1K_V1"):
        fastdet.FasterRCNN("mobilenet_v2", 3, weights_backbone="nowhere.pth")


def test_training_gives_losses_with_gradients_in_every_layer():
    model = small_detector().train()
    losses = model(*small_scene())
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name


def test_evaluation_gives_detections_in_pixels_of_the_images_as_given():
    model = small_detector().eval()
    images, _ = small_scene()
    small = model([images[0]])[0]
    assert set(small) == {"boxes", "labels", "scores"}
    assert small["boxes"].shape == (len(small["labels"]), 4)
    assert small["labels"].min() >= 1
    assert small["labels"].max() < NUM_CLASSES
    assert (small["scores"].diff() <= 0).all()
    assert small["boxes"][:, 2].max() <= 80
    # An image twice as large goes through the network at the same size, so the boxes come out twice as large.
    sizes = torch.tensor([[64, 80]])
    _, found = model.forward_padded(model.inspect([images[0]])["images"], sizes)
    count = int(found.count[0])
    [large] = unbatch(found, [(128, 160)], sizes, {})
    torch.testing.assert_close(large["boxes"], 2 * found.boxes[0, :count])


def test_losses_and_detections_in_one_call_in_either_mode():
    images, targets = small_scene()
    for training in (True, False):
        model = small_detector().train(training)
        # Dropout off, so that two calls can be compared; BatchNorm keeps its mode.
        model.backbone[3].p = 0.0
        statistics = model.backbone[1].running_mean.clone()
        torch.manual_seed(5)
        losses, detections = model(images, targets, return_losses=True)
        assert set(losses) == LOSSES
        assert len(detections) == 3
        assert model.training is training
        assert torch.equal(model.backbone[1].running_mean, statistics) is not training
        torch.manual_seed(5)
        if training:
            alone = model(images, targets)
            assert all(torch.equal(losses[name], alone[name]) for name in LOSSES)
        else:
            alone = model(images)
            for one, other in zip(detections, alone, strict=True):
                assert torch.equal(one["boxes"], other["boxes"])


def test_the_call_runs_the_padded_forward():
    model = small_detector().eval()
    images, _ = small_scene()
    inspected = model.inspect([images[0]])
    losses, detections = model.forward_padded(inspected["images"], torch.tensor([[64, 80]]))
    assert losses is None
    assert torch.equal(detections.boxes, inspected["detections"].boxes)
    with pytest.raises(ValueError, match="targets are needed"):
        model.forward_padded(inspected["images"], torch.tensor([[64, 80]]), compute_losses=True)
    none = fastdet.Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), torch.zeros(1, 0).bool())
    with pytest.raises(ValueError, match="at least one row"):
        model.forward_padded(inspected["images"], torch.tensor([[64, 80]]), none, compute_losses=True)


def test_minimum_side_is_in_pixels_of_the_original_image():
    """With a scale of 3 the same pixels need sides three times as long."""
    model = small_detector(rpn_min_size=8.0).eval()
    images, _ = small_scene()
    pixels, sizes = model.inspect([images[0]])["images"], torch.tensor([[64, 80]])
    counts = []
    for scale in (1.0, 3.0):
        proposals = model.rpn([model.backbone(pixels)], Batch(pixels, sizes, torch.tensor([scale]))).proposals
        boxes = proposals.boxes[0, : int(proposals.count[0])]
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 8 * scale
        counts.append(len(boxes))
    assert counts[0] > counts[1]


def test_an_image_without_boxes_trains_on_background():
    model = small_detector().train()
    images, targets = small_scene()
    inspected = model.inspect([images[1]], [targets[1]])
    assert (inspected["anchor_labels"] <= 0).all()
    assert (inspected["samples"].labels == 0).all()
    assert inspected["samples"].weight.sum() > 0
    total = sum(inspected["losses"].values())
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert inspected["losses"]["loss_box_reg"] == 0


def test_ignored_boxes_are_not_trained_on():
    model = small_detector(ignore_iof_thresh=None).eval()
    images, targets = small_scene()
    without = {name: value[:2] for name, value in targets[2].items()}
    torch.manual_seed(3)
    kept = model.inspect([images[2]], [targets[2]])
    torch.manual_seed(3)
    dropped = model.inspect([images[2]], [without])
    assert torch.equal(kept["anchor_labels"], dropped["anchor_labels"])
    assert int((kept["samples"].labels == 1).sum()) == 0


def covered_by(boxes, region):
    """The share of each box's area inside a region."""
    top_left, bottom_right = torch.maximum(boxes[:, :2], region[:2]), torch.minimum(boxes[:, 2:], region[2:])
    return (bottom_right - top_left).clamp(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)


def test_nothing_learns_to_be_background_in_ignored_regions():
    """A crowd over the right half of the image, and an object within it that is trained on."""
    crowd, inside = torch.tensor([38.0, 0, 80, 64]), torch.tensor([44.0, 20, 70, 50])
    targets = {
        "boxes": torch.stack([torch.tensor([5.0, 5, 30, 30]), crowd, inside]),
        "labels": torch.tensor([1, 2, 3]),
        "ignore": torch.tensor([False, True, False]),
    }
    image = small_scene()[0][0]
    everything = {"rpn_batch_size_per_image": 2000, "box_batch_size_per_image": 200, "box_bg_iou_thresh_low": 0.0}
    inspected, without = (
        small_detector(ignore_iof_thresh=share, **everything).eval().inspect([image], [targets])
        for share in (0.6, None)
    )
    covered = covered_by(inspected["anchors"], crowd) >= 0.6
    labels, plain = inspected["anchor_labels"][0], without["anchor_labels"][0]
    assert torch.equal(labels, torch.where(covered & (plain == 0), -1, plain))
    assert (covered & (plain == 0)).sum() > 10
    assert (covered & (labels == 1)).any(), "positives are trained on"
    samples = inspected["samples"]
    background = samples.boxes[0][(samples.labels[0] == 0) & (samples.weight[0] > 0)]
    assert len(background) > 0
    assert (covered_by(background, crowd) < 0.6).all()
    samples = without["samples"]
    assert (covered_by(samples.boxes[0][(samples.labels[0] == 0) & (samples.weight[0] > 0)], crowd) >= 0.6).any()
    assert 3 in inspected["samples"].labels.tolist()[0]
    assert 2 not in inspected["samples"].labels.tolist()[0]


def test_a_seed_fixes_the_samples():
    model = small_detector().eval()
    images, targets = small_scene()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.inspect(images, targets)["samples"])
    assert torch.equal(runs[0].boxes, runs[1].boxes)
    assert not torch.equal(runs[0].boxes, runs[2].boxes)


class TwoLevels(nn.Module):
    out_channels = 4

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(4, 4, 2, stride=2)

    def forward(self, images):
        fine = self.fine(images)
        return {"fine": fine, "coarse": self.coarse(fine)}


@pytest.mark.parametrize("pooling", ["max", "align"])
def test_several_levels_and_torchvisions_settings(pooling):
    torch.manual_seed(0)
    generator = fastdet.AnchorGenerator(sizes=((16,), (32,)), aspect_ratios=((0.5, 1.0, 2.0),))
    overrides = {"min_size": 64, "max_size": 96, "box_pooling": pooling, "rpn_post_nms_top_n_test": 30}
    overrides["box_featmap_names"] = None if pooling == "align" else ("coarse",)
    settings = fastdet.TORCHVISION.override(rpn_anchor_generator=generator, **overrides)
    model = fastdet.FasterRCNN(TwoLevels(), 3, settings=settings)
    images, targets = small_scene()
    targets = [{**target, "labels": target["labels"].clamp(max=2)} for target in targets]
    inspected = model.train().inspect(images, targets)
    assert inspected["images"].shape[-2:] == (96, 96), "padded to a multiple of 32"
    assert len(inspected["features"]) == 2
    assert inspected["anchors"].shape == (3 * (12 * 12 + 6 * 6), 4)
    assert inspected["rpn_logits"].shape[-1] == 1
    sum(inspected["losses"].values()).backward()
    assert model.backbone.fine.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert model.eval().inspect(images)["proposals"].boxes.shape == (3, 30, 4)
    with pytest.raises(ValueError, match=r"anchors are for 5 feature levels .* gives 2"):
        fastdet.FasterRCNN(TwoLevels(), 3, min_size=64, max_size=96)(images, targets)
    if pooling == "max":
        model.settings = model.settings.override(box_featmap_names=None)
        with pytest.raises(ValueError, match=r"'max' pools from one level, not from \['fine', 'coarse'\]"):
            model(images)


def test_anchors_and_pooling_use_the_backbones_stride():
    model = fastdet.FasterRCNN("small", 3, min_size=64, max_size=64)
    assert model.inspect([torch.rand(3, 64, 64)])["anchors"].shape == (8 * 8 * 9, 4)
    assert model.settings.rpn_anchor_generator.strides == (8,)
    # From a feature map of one row the stride cannot be inferred.
    low = fastdet.FasterRCNN("mobilenet_v2", 3, min_size=17, max_size=400).eval()
    inspected = low.inspect([torch.rand(3, 17, 400)])
    moved = torch.tensor([24 * 16, 16, 24 * 16, 16])
    torch.testing.assert_close(inspected["anchors"][-1], inspected["anchors"][8] + moved)
    expected = fastdet.ops.batched_roi_pool(
        inspected["features"], inspected["proposals"].boxes, 7, 1 / 16, inspected["proposals"].valid
    )
    assert torch.equal(inspected["pooled"], expected)
    with pytest.raises(ValueError, match="leaves no features"):
        fastdet.AnchorGenerator().level_strides((8, 8), [(0, 0)])


def test_roi_align_under_autocast_keeps_boxes_in_fp32():
    model = small_detector(box_pooling="align")
    feature = torch.arange(128.0).sub(64).expand(1, 4, 3, 128).contiguous()
    boxes = torch.tensor([[[1027.0, 4, 1035, 30]]])
    batch = Batch(torch.empty(1, 3, 48, 2048), torch.tensor([[48, 2048]]), torch.ones(1))
    proposals = Proposals(boxes, torch.zeros(1, 1), torch.ones(1, dtype=torch.int64))
    expected = model.roi_heads({"0": feature}, proposals, batch).pooled
    with torch.autocast("cpu", torch.bfloat16):
        found = model.roi_heads({"0": feature.bfloat16()}, proposals, batch).pooled
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_a_step_under_autocast_gives_fp32_losses():
    model, scene = small_detector().train(), small_scene()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*scene)
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_models_are_copied_and_pickled():
    model, images = small_detector().eval(), small_scene()[0]
    expected = model(images)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(expected, copied(images), strict=True))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((600, 901), (600, 901)), ((300, 300), (600, 600)), ((400, 1000), (400, 1000)), ((3, 2000), (1, 1000))],
)
def test_the_longer_side_limits(size, expected):
    assert resized_size(size, 600, 1000)[0] == expected


def test_shares_of_positives_and_clamps_are_applied():
    images, _ = small_scene()
    crowded = {"boxes": torch.rand(40, 2).mul(40).repeat(1, 2).add(torch.tensor([0, 0, 20.0, 20.0]))}
    crowded["labels"] = torch.ones(40, dtype=torch.int64)
    model = small_detector(
        rpn_positive_fraction=0.25, rpn_batch_size_per_image=16, box_positive_fraction=0.5, rpn_fg_iou_thresh=0.35
    )
    inspected = model.inspect([images[0]], [crowded])
    assert int((inspected["anchor_labels"] == 1).sum()) == 4
    assert int((inspected["anchor_labels"] == 0).sum()) == 12
    assert int((inspected["samples"].labels > 0).sum()) == 8
    # Without a clamp a large dw gives a box as wide as the image, with one a box of at most that factor.
    wide = small_detector(bbox_xform_clip=0.1, rpn_nms_thresh=1.0).eval()
    nn.init.constant_(wide.rpn.head.bbox_pred.bias, 5.0)
    nn.init.zeros_(wide.rpn.head.bbox_pred.weight)
    boxes = wide.inspect([images[0]])["proposals"].boxes[0]
    assert (boxes[:, 2] - boxes[:, 0]).max() <= 32 * 2**0.5 * 1.106


def test_settings_are_changed_in_one_place():
    model = small_detector().eval()
    images, _ = small_scene()
    before = model(images)
    model.settings = model.settings.override(box_score_thresh=0.4, box_detections_per_img=3, rpn_nms_thresh=0.5)
    found = model(images)
    assert max(len(one["boxes"]) for one in found) <= 3 < max(len(one["boxes"]) for one in before)
    assert all((one["scores"] > 0.4).all() for one in found)
    with pytest.raises(ValueError, match="rpn_anchor_generator, box_pool_size: the layers are built for the old value"):
        model.settings = model.settings.override(rpn_anchor_generator=fastdet.AnchorGenerator(), box_pool_size=5)
    # torchvision's users assign these, which would have no effect here.
    for part, name, words in (
        (model.roi_heads, "score_thresh", "box_score_thresh"),
        (model.roi_heads, "detections_per_img", "box_detections_per_img"),
        (model.rpn, "nms_thresh", "rpn_nms_thresh"),
    ):
        with pytest.raises(AttributeError, match=rf"settings.override\({words}="):
            setattr(part, name, 0.3)


def test_one_bucket_makes_detections_independent_of_the_batch():
    images, _ = small_scene()
    for buckets, equal in ((((96, 96),), True), ((), False)):
        model = small_detector(size_buckets=buckets, box_score_thresh=0.2).eval()
        together = model(images)
        assert sum(len(one["boxes"]) for one in together) > 10
        alone = [model([image])[0] for image in images]
        same = all(
            len(one["boxes"]) == len(other["boxes"]) and torch.allclose(one["boxes"], other["boxes"], atol=1e-3)
            for one, other in zip(together, alone, strict=True)
        )
        assert same == equal


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {"detector": model, "rpn": model.rpn, "roi_heads": model.roi_heads}


def test_every_attribute_of_torchvisions_detector_is_used_or_refused():
    """The attributes of its modules, and the methods of their classes."""
    model = fastdet.FasterRCNN("mobilenet_v2_fpn", 5)
    theirs = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    of_modules = {*dir(nn.Module()), "backbone", "rpn", "roi_heads", "head", "box_head", "box_predictor"}
    refused = 0
    for name, part in parts_of(model).items():
        reference = parts_of(theirs)[name]
        of_theirs = {
            *vars(reference),
            *reference._modules,
            *(key for kind in type(reference).mro()[:-2] for key in vars(kind)),
        }
        for attribute in of_theirs - of_modules - {"_has_warned", "eager_outputs"} - set(dir(part)):
            with pytest.raises(AttributeError, match=f"^{attribute} has no effect on fastdet's {type(part).__name__}"):
                setattr(part, attribute, getattr(reference, attribute))
            refused += 1
    assert refused > 25
    model.roi_heads.box_predictor = theirs.roi_heads.box_predictor
    model.note = "other names are free"


def step_losses(**changes):
    model = small_detector(**changes).eval()
    torch.manual_seed(5)
    return model.inspect(*small_scene())


def test_losses_are_weighted():
    plain = step_losses()["losses"]
    weighted = step_losses(loss_weights=(2.0, 0.5, 3.0, 0.0))["losses"]
    for name, factor in zip(fastdet.models.losses.NAMES, (2.0, 0.5, 3.0, 0.0), strict=True):
        torch.testing.assert_close(weighted[name], plain[name] * factor)
    model = small_detector(loss_weights=(0.0, 0.0, 0.0, 1.0)).eval()
    sum(model(*small_scene(), return_losses=True)[0].values()).backward()
    assert model.rpn.head.cls_logits.weight.grad.abs().sum() == 0
    assert model.rpn.head.bbox_pred.weight.grad.abs().sum() > 0


def test_classes_are_weighted():
    weights = (0.5, 2.0, 1.0, 4.0)
    inspected = step_losses(class_weights=weights)
    valid = inspected["samples"].weight > 0
    scores, labels = inspected["class_logits"][valid], inspected["samples"].labels[valid]
    assert len(labels.unique()) > 2
    expected = nn.functional.cross_entropy(scores, labels, torch.tensor(weights))
    torch.testing.assert_close(inspected["losses"]["loss_classifier"], expected)
    torch.testing.assert_close(step_losses(class_weights=(1.0,) * 4)["losses"], step_losses()["losses"])
    tiny_weights = step_losses(class_weights=(0.0, 0.0, 0.0, 1e-3))["losses"]["loss_classifier"]
    assert torch.isfinite(tiny_weights)
    with pytest.raises(ValueError, match="class_weights must hold 4 numbers"):
        small_detector(class_weights=(1.0, 1.0))
    model = small_detector(class_weights=weights)
    model.roi_heads.box_predictor = torchvision.models.detection.faster_rcnn.FastRCNNPredictor(16, 7)
    with pytest.raises(ValueError, match="class_weights must hold 7 numbers"):
        model(*small_scene())


def test_features_and_all_scores_of_each_detection():
    model = small_detector(box_score_thresh=0.2).eval()
    images, _ = small_scene()
    inspected = model.inspect(images)
    plain = model(images)
    found = model(images, return_features=True, return_class_scores=True)
    assert sum(len(one["boxes"]) for one in found) > 10
    for i, one in enumerate(found):
        assert set(one) == {"boxes", "labels", "scores", "features", "class_scores"}
        assert torch.equal(one["boxes"], plain[i]["boxes"])
        rows = one["class_scores"]
        assert rows.shape == (len(one["boxes"]), NUM_CLASSES)
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
        # The score of a detection is the one of its class.
        torch.testing.assert_close(rows.gather(1, one["labels"][:, None])[:, 0], one["scores"])
        # The predictor gives the same scores from the returned features.
        again = model.roi_heads.box_predictor(one["features"])[0].softmax(1)
        torch.testing.assert_close(again, rows)
        assert one["features"].shape == (len(rows), 16)
    index = inspected["detections"].index
    torch.testing.assert_close(inspected["box_features"][0, index[0, 0]], found[0]["features"][0])
    with pytest.raises(ValueError, match=r"return_features .* in training, return_losses too"):
        small_detector().train()(*small_scene(), return_features=True)
    losses, both = model(images, small_scene()[1], return_losses=True, return_features=True)
    assert set(losses) == LOSSES
    assert "features" in both[0]
    nothing = small_detector(box_score_thresh=1.0).eval()(images, return_features=True, return_class_scores=True)
    assert nothing[0]["features"].shape == (0, 16)
    assert nothing[0]["class_scores"].shape == (0, NUM_CLASSES)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["small", "mobilenet_v2", "resnet18_fpn"])
def test_other_channel_counts(name, channels):
    settings = {"image_mean": (0.5,) * channels, "image_std": (0.2,) * channels, "min_size": 64, "max_size": 96}
    model = fastdet.FasterRCNN(name, 3, rpn_post_nms_top_n_test=10, **settings)
    images, targets = small_scene()
    images = [torch.rand(channels, *image.shape[1:]) for image in images]
    targets = [{**target, "labels": target["labels"].clamp(max=2)} for target in targets]
    sum(model(images, targets).values()).backward()
    first = next(layer for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d))
    assert first.weight.shape[1] == channels
    assert (first.weight.grad.flatten(2).abs().sum(2) > 0).any(0).all()
    filters = first.weight.detach().flatten(2).transpose(0, 1)
    assert channels == 1 or not torch.equal(filters[0], filters[3]), "channels that start alike stay alike"
    with pytest.raises(ValueError, match=rf"{channels} x H x W, or 1 x H x W \(as image_mean has {channels}\)"):
        model([torch.rand(3, 64, 64)])


def test_pretrained_weights_are_repeated_over_more_channels(tmp_path):
    features = torchvision.models.mobilenet_v2().features
    torch.save(features.state_dict(), tmp_path / "features.pth")
    old = features[0][0].weight
    for channels in (1, 2, 5):
        backbone, _ = fastdet.models.backbones.build("mobilenet_v2", tmp_path / "features.pth", in_channels=channels)
        new = backbone[0][0].weight
        for channel in range(channels):
            torch.testing.assert_close(new[:, channel], old[:, channel % 3] * 3 / channels)
    assert torch.equal(fastdet.models.backbones.build("mobilenet_v2", tmp_path / "features.pth")[0][0][0].weight, old)


def test_images_of_bytes():
    images, _ = small_scene()
    model = small_detector().eval()
    whole = [(image * 255).round() for image in images]
    found, expected = model([image.byte() for image in whole]), model([image / 255 for image in whole])
    assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(found, expected, strict=True))
    torch.testing.assert_close(
        model.inspect([whole[0].byte()])["images"], model.inspect([whole[0] / 255])["images"], rtol=0, atol=1e-6
    )


def test_heads_that_do_not_fit_the_anchors_are_refused():
    head = RPNHead(4, 8, num_anchors=3, logits_per_anchor=2)
    model = small_detector(rpn_head=head).eval()
    with pytest.raises(ValueError, match=r"gives \[6\] channels of logits .* \[6\] anchors a cell need \[12\]"):
        model([torch.rand(3, 64, 64)])


def test_size_buckets_fix_the_padded_shape():
    images, _ = small_scene()
    model = small_detector(size_buckets=((96, 96), (128, 128))).eval()
    assert model.inspect(images)["images"].shape[-2:] == (96, 96)
    model = small_detector(size_buckets=((64, 64),)).eval()
    with pytest.raises(ValueError, match=r"87 x 80 pixels fits none of size_buckets"):
        model(images)


def test_input_formats():
    image = torch.rand(3, 64, 80)
    mean, std = (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)
    model = small_detector(image_format="bgr255", image_mean=mean, image_std=std).eval()
    expected = image.flip(0) * 255 - torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(model.inspect([image])["images"][0], expected)
    half = small_detector().eval().inspect([image.half()])["images"]
    assert half.dtype == torch.float32


def test_unknown_settings_are_refused_with_similar_names():
    with pytest.raises(TypeError, match=r"'rpn_post_nms_topn'.*rpn_post_nms_top_n_test"):
        fastdet.FasterRCNN(TinyBackbone(), 3, rpn_post_nms_topn=5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rpn_nms_thresh": 1.5}, r"rpn_nms_thresh .*\[0, 1\], got 1.5"),
        ({"rpn_post_nms_top_n_test": 0}, "rpn_post_nms_top_n_test .*got 0"),
        ({"box_detections_per_img": -1}, "box_detections_per_img .*got -1"),
        ({"rpn_bg_iou_thresh": 0.9}, r"rpn_bg_iou_thresh \(0.9\) must not be above rpn_fg_iou_thresh"),
        ({"box_pooling": "mean"}, "box_pooling must be one of"),
        ({"min_size": 2000}, r"max_size must be at least min_size \(2000\)"),
        ({"rpn_anchors_inside_only": "no"}, "rpn_anchors_inside_only must be True or False"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std"),
        ({"image_mean": 0.5}, "image_mean must be a number for each channel"),
        ({"bbox_reg_weights": 5}, "bbox_reg_weights must be 4 positive numbers"),
        ({"bbox_xform_clip": "a"}, "bbox_xform_clip"),
        ({"box_sampling_ratio": -3}, "box_sampling_ratio"),
        ({"box_num_convs": 1.5}, "box_num_convs"),
        ({"rpn_conv_depth": 0}, "rpn_conv_depth"),
        ({"ignore_iof_thresh": 2}, r"ignore_iof_thresh .*\[0, 1\] or None, got 2"),
        ({"loss_weights": (1, 1, 1)}, "loss_weights must be 4 numbers"),
        ({"class_weights": (0, 0)}, "class_weights must be numbers"),
        ({"class_weights": 3}, "class_weights must be numbers"),
        ({"box_aligned": 1}, "box_aligned must be True or False"),
        ({"size_buckets": (64, 64)}, "size_buckets must be pairs"),
        ({"box_featmap_names": 5}, "box_featmap_names"),
        ({"rpn_anchor_generator": None}, "rpn_anchor_generator must be an AnchorGenerator"),
    ],
)
def test_settings_out_of_range_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        fastdet.Settings(**setting)


def test_backbones_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="one of vgg16, mobilenet_v2"):
        fastdet.FasterRCNN("resnet", 3)
    with pytest.raises(ValueError, match="out_channels"):
        fastdet.FasterRCNN(nn.Identity(), 3)
    with pytest.raises(ValueError, match="num_classes"):
        fastdet.FasterRCNN(TinyBackbone(), 1)
    with pytest.raises(ValueError, match="given by name"):
        fastdet.FasterRCNN(TinyBackbone(), 3, weights_backbone="IMAGENET1K_V1")
    with pytest.raises(ValueError, match=r"trainable_backbone_layers must lie in 0\.\.5 for vgg16, got 6"):
        fastdet.fasterrcnn_vgg16(3, trainable_backbone_layers=6)


NAN, INF = float("nan"), float("inf")
IMAGE = torch.zeros(3, 64, 80)


def target(*boxes, labels=None):
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels or [1] * len(boxes))}


@pytest.mark.parametrize(
    ("images", "targets", "words"),
    [
        ([], [], "images is empty"),
        (IMAGE, None, r"images must be a list of tensors, or one \[B, C, H, W\], got torch.float32 of \[3, "),
        ([IMAGE, torch.zeros(2, 64, 64)], None, r"image 1 must be .*3 x H x W.*, got .*\[2, 64, 64\]"),
        ([IMAGE.int()], None, "image 0 .*int32"),
        ([IMAGE, IMAGE], [target([0.0, 0, 9, 9])], "2 images, but 1 targets"),
        ([IMAGE], None, "targets are needed"),
        ([IMAGE], [{"boxes": torch.zeros(1, 4)}], r"target 0 must be a dict with boxes and labels, got \['boxes'\]"),
        ([IMAGE], [{"boxes": torch.zeros(4), "labels": torch.ones(1).long()}], r"target 0: boxes .*\[4\]"),
        ([IMAGE], [{"boxes": torch.zeros(2, 5), "labels": torch.ones(2).long()}], r"target 0: boxes .*\[2, 5\]"),
        ([IMAGE], [target([0j, 0, 9, 9])], "target 0: boxes must be real numbers .*complex64"),
        ([IMAGE], [target([0.0, 0, 9, 9], labels=[1, 2])], r"target 0: labels must be integers \[1\]"),
        ([IMAGE], [target([0.0, 0, 9, 9], [1.0, 1, 8, 8], labels=[1, 4])], r"target 0: box 1 has a label outside 1..3"),
        ([IMAGE], [target([0.0, 0, 9, 9], labels=[0])], "box 0 has a label outside"),
        ([IMAGE, IMAGE], [target([0.0, 0, 9, 9]), target([9.0, 0, 9, 9])], r"target 1: box 0 has no area .*\[9.0, 0.0"),
        ([IMAGE], [target([0.0, NAN, 9, 9])], "target 0: box 0 is not finite"),
        ([IMAGE], [target([0.0, 0, INF, 9])], "target 0: box 0 is not finite"),
        ([IMAGE], [target([80.0, 0, 99, 9])], "target 0: box 0 lies wholly outside the image of 64 x 80"),
        ([IMAGE], [{**target([0.0, 0, 9, 9]), "ignore": torch.tensor([1])}], r"target 0: ignore must be bool \[1\]"),
    ],
)
def test_bad_input_names_the_image_and_the_box(monkeypatch, images, targets, words):
    model = small_detector().train()

    def untouched(*args):
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(model.backbone, "forward", untouched)
    with pytest.raises(ValueError, match=words):
        model(images, targets)


def test_a_default_device_does_not_change_where_padding_is_done():
    """Such as `torch.set_default_device("cuda")`: padding is done on the host and copied from pinned memory."""
    images, targets = small_scene()
    model = small_detector().train()
    targets = [{**target, "seed": torch.tensor(number)} for number, target in enumerate(targets)]
    batch, padded, _ = model.preprocess(images, targets)
    with torch.device("meta"):
        again, again_padded, _ = model.preprocess(images, targets)
    for one, other in zip((*batch, *padded), (*again, *again_padded), strict=True):
        assert torch.equal(one, other)


WRONG = {
    "none": None,
    "text": "x",
    "negative": -1,
    "nan": float("nan"),
    "true": True,
    "zero": 0.0,
    "empty": [],
    "object": object(),
    "tensor": torch.ones(2),
}
# The fields that accept one of these values all the same.
ACCEPTED = {
    "none": "ignore_iof_thresh rpn_hidden_channels bbox_xform_clip box_featmap_names box_predictor_std class_weights "
    "box_detections_per_img",
    "true": "rpn_anchors_inside_only rpn_min_size_in_original_pixels rpn_min_size_before_top_n box_aligned",
    "zero": "ignore_iof_thresh rpn_nms_thresh rpn_bg_iou_thresh rpn_score_thresh rpn_positive_fraction rpn_min_size "
    "rpn_smooth_l1_beta box_bg_iou_thresh_low box_positive_fraction box_score_thresh box_nms_thresh box_min_size "
    "box_smooth_l1_beta",
    "empty": "size_buckets",
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(fastdet.Settings)])
def test_every_setting_refuses_what_it_is_not(field):
    for name, value in WRONG.items():
        if field in ACCEPTED.get(name, "").split():
            assert getattr(fastdet.Settings(**{field: value}), field) == (() if name == "empty" else value)
        else:
            with pytest.raises(ValueError, match=field):
                fastdet.Settings(**{field: value})


def test_settings_of_lists_equal_those_of_tuples():
    lists = fastdet.Settings(size_buckets=[[64, 64]], image_mean=[0.1, 0.2, 0.3])
    assert lists == fastdet.Settings(size_buckets=((64, 64),), image_mean=(0.1, 0.2, 0.3))
    assert len({lists, lists.override()}) == 1
    model = small_detector()
    model.settings = model.settings.override(image_mean=list(model.settings.image_mean))


@pytest.mark.parametrize(
    "arguments",
    [
        {"offset": "x"},
        {"offset": float("nan")},
        {"rounded": "x"},
        {"rounded": 1},
        {"strides": 16},
        {"strides": (True,)},
        {"strides": (16, 32)},
        {"sizes": ((True,),)},
        {"sizes": "x"},
        {"aspect_ratios": ((-1.0,),)},
    ],
)
def test_anchor_generators_refuse_what_is_none(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        fastdet.AnchorGenerator(**arguments)


def test_the_settings_of_a_part_are_the_detectors():
    model = small_detector()
    for part in (model.rpn, model.roi_heads):
        with pytest.raises(AttributeError):
            part.settings = model.settings.override(rpn_nms_thresh=0.1)
        assert part.settings is model.settings


def test_reading_a_refused_attribute_names_what_to_do():
    model = small_detector()
    with pytest.raises(AttributeError, match=r"^transform has no effect .*override\(min_size="):
        model.transform.min_size = (64,)
    with pytest.raises(AttributeError, match=r"^_pre_nms_top_n .*rpn_pre_nms_top_n_test="):
        model.rpn._pre_nms_top_n["testing"] = 5
    with pytest.raises(AttributeError, match=r"model.compile"):
        model.core = torch.compile(model.forward_padded)
    assert not hasattr(model, "transform")
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = model.other


def test_the_error_for_a_module_of_one_level_names_what_to_give():
    anchors = fastdet.AnchorGenerator(sizes=((16, 32),))
    images = [torch.rand(3, 64, 64)]
    with pytest.raises(ValueError, match=r"give the detector box_featmap_names=\('0',\)"):
        fastdet.FasterRCNN(TinyBackbone(), 3, rpn_anchor_generator=anchors, min_size=64).eval()(images)
    with pytest.raises(ValueError, match=r"for 5 feature levels .* gives 1 .*: give rpn_anchor_generator"):
        fastdet.FasterRCNN(TinyBackbone(), 3, min_size=64).eval()(images)
    backbone = TinyBackbone()
    backbone.strides = (16,)
    with pytest.raises(ValueError, match=r"backbone has 1 feature levels, but the anchors are for 5: give rpn_anchor"):
        fastdet.FasterRCNN(backbone, 3, min_size=64)
    given = {"rpn_anchor_generator": anchors, "box_featmap_names": ("0",), "min_size": 64}
    assert set(fastdet.FasterRCNN(backbone, 3, **given).eval()(images)[0]) == {"boxes", "labels", "scores"}


def test_each_part_asks_for_targets_by_itself():
    model = small_detector()
    batch, targets, _ = model.preprocess(*small_scene())
    features = model.extract_features(batch.images)
    none = type(targets)(*(tensor[:, :0] for tensor in targets[:3]))
    for missing in (None, none):
        with pytest.raises(ValueError, match="targets are needed for the losses"):
            model.rpn(list(features.values()), batch, missing, compute_losses=True)
    proposals = model.rpn(list(features.values()), batch).proposals
    with pytest.raises(ValueError, match="targets are needed for the losses"):
        model.roi_heads(features, proposals, batch, none)


def test_a_box_head_of_convolutions_can_be_wrapped():
    """Compiled it still gets the mask; inside another module it refuses to train without."""
    images, targets = small_scene()
    expected = small_detector(box_num_convs=1).train()
    found = copy.deepcopy(expected)
    found.roi_heads.box_head = torch.compile(found.roi_heads.box_head, backend="eager")
    losses = []
    for model in (expected, found):
        torch.manual_seed(0)
        losses.append(model(images, targets))
    torch.testing.assert_close(losses[0], losses[1])
    norms = [[m for m in model.modules() if isinstance(m, MaskedBatchNorm2d)] for model in (expected, found)]
    torch.testing.assert_close(norms[0][0].running_mean, norms[1][0].running_mean)
    expected.roi_heads.box_head = nn.Sequential(expected.roi_heads.box_head, nn.Dropout())
    with pytest.raises(ValueError, match="takes_valid"):
        expected(images, targets)
    expected.eval()(images)
