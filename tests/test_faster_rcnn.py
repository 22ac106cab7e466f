import copy
import pickle

import pytest
import torch
import torchvision
from scenes_of_detection import NUM_CLASSES, TinyBackbone, small_detector, small_scene
from torch import nn

import fastdet
from fastdet.batching import resized_size, unbatch

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


def test_the_numbers_of_vgg16_in_training(vgg16, photograph):
    image, target = photograph
    with torch.no_grad():
        seen = vgg16.train().inspect([image], [target])
    assert seen["images"].shape == (1, 3, 600, 901)
    assert seen["features"].shape == (1, 512, 37, 56)
    assert seen["anchors"].shape == (18648, 4)
    assert int(seen["anchors_inside"].sum()) == 6928
    assert seen["rpn_locs"].shape == (1, 18648, 4)
    assert seen["rpn_scores"].shape == (1, 18648, 2)
    assert seen["proposals"].boxes.shape == (1, 2000, 4)
    labels = seen["anchor_labels"]
    assert int((labels >= 0).sum()) == 256
    assert 1 <= int((labels == 1).sum()) <= 128
    assert (labels[~seen["anchors_inside"]] == -1).all()
    assert (seen["anchor_locs"][~seen["anchors_inside"]] == 0).all()
    samples = seen["samples"]
    assert samples.boxes.shape == (1, 128, 4)
    # An untrained RPN proposes too few boxes that overlap something to fill every slot.
    positive = (samples.labels > 0) & (samples.weight > 0)
    assert 2 <= int(positive.sum()) <= 32, "the ground truth itself is among the positives"
    assert seen["pooled"].shape == (1, 128, 512, 7, 7)
    assert seen["cls_locs"].shape == (1, 128, 84)
    assert seen["cls_scores"].shape == (1, 128, 21)
    assert set(seen["losses"]) == LOSSES


def test_the_numbers_of_vgg16_in_evaluation(vgg16, photograph):
    with torch.no_grad():
        seen = vgg16.eval().inspect([photograph[0]])
    assert seen["proposals"].boxes.shape == (1, 300, 4)
    assert int(seen["proposals"].count[0]) == 300
    assert seen["cls_locs"].shape == (1, 300, 84)
    assert seen["cls_scores"].shape == (1, 300, 21)
    assert seen["detections"].boxes.shape == (1, 300 * 20, 4)
    assert seen["detections"].scores.shape == (1, 300 * 20)


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
    again = fastdet.fasterrcnn_vgg16(weights=tmp_path / "detector.pth")
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
        ({"features.0.weight": torch.zeros(3)}, "Missing key|size mismatch"),
        ({"layer1.conv.weight": torch.zeros(3)}, "not a state dict of vgg16: it holds 'layer1.conv.weight'"),
        ([1, 2], "does not hold a state dict"),
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
    _, found = model.core(model.inspect([images[0]])["images"], sizes)
    count = int(found.count[0])
    [large] = unbatch(found, [(128, 160)], sizes)
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


def test_core_is_what_the_call_runs():
    model = small_detector().eval()
    images, _ = small_scene()
    seen = model.inspect([images[0]])
    losses, detections = model.core(seen["images"], torch.tensor([[64, 80]]))
    assert losses is None
    assert torch.equal(detections.boxes, seen["detections"].boxes)
    with pytest.raises(ValueError, match="targets are needed"):
        model.core(seen["images"], torch.tensor([[64, 80]]), want_losses=True)
    none = fastdet.Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), torch.zeros(1, 0).bool())
    with pytest.raises(ValueError, match="at least one row"):
        model.core(seen["images"], torch.tensor([[64, 80]]), none, want_losses=True)


def test_minimum_side_is_in_pixels_of_the_original_image():
    """The same pixels, said to be resized by 3, need sides three times as long."""
    model = small_detector(rpn_min_size=8.0).eval()
    images, _ = small_scene()
    pixels, sizes = model.inspect([images[0]])["images"], torch.tensor([[64, 80]])
    counts = []
    for scale in (1.0, 3.0):
        output = model.rpn([model.backbone(pixels)])
        proposals = model.rpn.propose(output, sizes, torch.tensor([scale]), (64, 80), training=True)
        boxes = proposals.boxes[0, : int(proposals.count[0])]
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 8 * scale
        counts.append(len(boxes))
    assert counts[0] > counts[1]


def test_an_image_without_boxes_trains_on_background():
    model = small_detector().train()
    images, targets = small_scene()
    seen = model.inspect([images[1]], [targets[1]])
    assert (seen["anchor_labels"] <= 0).all()
    assert (seen["samples"].labels == 0).all()
    assert seen["samples"].weight.sum() > 0
    total = sum(seen["losses"].values())
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert seen["losses"]["loss_box_reg"] == 0


def test_ignored_boxes_are_not_trained_on():
    model = small_detector().eval()
    images, targets = small_scene()
    without = {name: value[:2] for name, value in targets[2].items()}
    torch.manual_seed(3)
    kept = model.inspect([images[2]], [targets[2]])
    torch.manual_seed(3)
    dropped = model.inspect([images[2]], [without])
    assert torch.equal(kept["anchor_labels"], dropped["anchor_labels"])
    assert int((kept["samples"].labels == 1).sum()) == 0


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
    numbers = {"min_size": 64, "max_size": 96, "box_pooling": pooling, "rpn_post_nms_top_n_test": 30}
    settings = fastdet.TORCHVISION.override(rpn_anchor_generator=generator, **numbers)
    model = fastdet.FasterRCNN(TwoLevels(), 3, settings=settings)
    images, targets = small_scene()
    targets = [{**target, "labels": target["labels"].clamp(max=2)} for target in targets]
    seen = model.train().inspect(images, targets)
    assert seen["images"].shape[-2:] == (96, 96), "padded to a multiple of 32"
    assert len(seen["features"]) == 2
    assert seen["anchors"].shape == (3 * (12 * 12 + 6 * 6), 4)
    assert seen["rpn_scores"].shape[-1] == 1
    sum(seen["losses"].values()).backward()
    assert model.backbone.fine.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert model.eval().inspect(images)["proposals"].boxes.shape == (3, 30, 4)
    with pytest.raises(ValueError, match=r"anchors are for 1 feature levels .* gives 2"):
        fastdet.FasterRCNN(TwoLevels(), 3, min_size=64, max_size=96)(images, targets)


def test_anchors_and_pooling_use_the_backbones_stride():
    model = fastdet.FasterRCNN("small", 3, min_size=64, max_size=64)
    assert model.inspect([torch.rand(3, 64, 64)])["anchors"].shape == (8 * 8 * 9, 4)
    assert model.settings.rpn_anchor_generator.strides == (8,)
    # A feature map of one row says nothing about the stride.
    low = fastdet.FasterRCNN("mobilenet_v2", 3, min_size=17, max_size=400).eval()
    seen = low._look(torch.rand(1, 3, 17, 400))
    assert seen.pooled_scales == [1 / 16]
    assert low.rpn.anchors(seen.output, seen.image_size)[-1].tolist() == pytest.approx(
        low.rpn.anchors(seen.output, seen.image_size)[8].add(torch.tensor([24 * 16, 16, 24 * 16, 16])).tolist()
    )
    with pytest.raises(ValueError, match="leaves no features"):
        fastdet.AnchorGenerator().level_strides((8, 8), [(0, 0)])


def test_large_boxes_are_pooled_from_coarse_levels():
    boxes = torch.tensor([[[0.0, 0, 20, 20], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 900, 900], [0, 0, 0, 0]]])
    level = fastdet.roi_heads._level_of(boxes, [1 / 4, 1 / 8, 1 / 16, 1 / 32])
    assert level.tolist() == [[0, 1, 2, 3, 0]]


def test_roi_align_under_autocast_keeps_boxes_in_fp32():
    model = small_detector(box_pooling="align")
    feature = torch.arange(128.0).sub(64).expand(1, 4, 3, 128).contiguous()
    boxes, valid = torch.tensor([[[1027.0, 4, 1035, 30]]]), torch.ones(1, 1, dtype=torch.bool)
    expected = model.roi_heads.pool([feature], boxes, valid, [1 / 16])
    with torch.autocast("cpu", torch.bfloat16):
        found = model.roi_heads.pool([feature.bfloat16()], boxes, valid, [1 / 16])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_a_step_under_autocast_gives_fp32_losses():
    model, scene = small_detector().train(), small_scene()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*scene)
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    with pytest.raises(TypeError, match=r"float32, got torch.bfloat16; .*autocast"):
        model.bfloat16()(*scene)


def test_models_are_copied_and_pickled():
    model, images = small_detector().eval(), small_scene()[0]
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(expected, twin(images), strict=True))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((600, 901), (600, 901)), ((300, 300), (600, 600)), ((400, 1000), (400, 1000)), ((3, 2000), (1, 1000))],
)
def test_the_longer_side_limits(size, expected):
    assert resized_size(size, 600, 1000)[0] == expected


def test_shares_of_positives_and_clamps_are_obeyed():
    images, _ = small_scene()
    crowded = {"boxes": torch.rand(40, 2).mul(40).repeat(1, 2).add(torch.tensor([0, 0, 20.0, 20.0]))}
    crowded["labels"] = torch.ones(40, dtype=torch.int64)
    model = small_detector(
        rpn_positive_fraction=0.25, rpn_batch_size_per_image=16, box_positive_fraction=0.5, rpn_fg_iou_thresh=0.35
    )
    seen = model.inspect([images[0]], [crowded])
    assert int((seen["anchor_labels"] == 1).sum()) == 4
    assert int((seen["anchor_labels"] == 0).sum()) == 12
    assert int((seen["samples"].labels > 0).sum()) == 8
    # Without a clamp a large dw gives a box as wide as the image, with one a box of at most that factor.
    wide = small_detector(bbox_xform_clip=0.1, rpn_nms_thresh=1.0).eval()
    nn.init.constant_(wide.rpn.head.bbox_pred.bias, 5.0)
    nn.init.zeros_(wide.rpn.head.bbox_pred.weight)
    boxes = wide.inspect([images[0]])["proposals"].boxes[0]
    assert (boxes[:, 2] - boxes[:, 0]).max() <= 32 * 2**0.5 * 1.106


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


def test_unknown_settings_are_refused_with_the_near_names():
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
        fastdet.FasterRCNN("resnet18", 3)
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
        (torch.zeros(2, 3, 64, 64), None, "images must be a list"),
        ([IMAGE, torch.zeros(1, 64, 64)], None, r"image 1 must be .*3 x H x W, got .*\[1, 64, 64\]"),
        ([IMAGE.byte()], None, "image 0 .*uint8"),
        ([IMAGE, IMAGE], [target([0.0, 0, 9, 9])], "2 images, but 1 targets"),
        ([IMAGE], None, "targets are needed"),
        ([IMAGE], [{"boxes": torch.zeros(1, 4)}], r"target 0 must be a dict with boxes and labels, got \['boxes'\]"),
        ([IMAGE], [{"boxes": torch.zeros(4), "labels": torch.ones(1).long()}], r"target 0: boxes .*\[4\]"),
        ([IMAGE], [{"boxes": torch.zeros(2, 5), "labels": torch.ones(2).long()}], r"target 0: boxes .*\[2, 5\]"),
        ([IMAGE], [target([0, 0, 9, 9])], "target 0: boxes must be floating point .*int64"),
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
