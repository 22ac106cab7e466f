"""What the detector's entry point refuses, by name and before any work."""

import random
import warnings

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

import fastdet
from fastdet import FasterRCNN
from fastdet.models import anchors, backbones, preprocessing
from tests.helpers.detectors import small_detector


@pytest.fixture(scope="module")
def model():
    return FasterRCNN("small", 3, min_size=64, max_size=96, box_representation_size=16)


def image(value=0.5, height=70, width=90):
    return torch.full((3, height, width), value)


def box(*corners):
    return {"boxes": torch.tensor([corners]), "labels": torch.ones(1, dtype=torch.int64)}


UNUSUAL = {
    "sparse": lambda: image().to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(3, 3)], layout=torch.jagged),
    "meta": lambda: image().to("meta"),
    "complex": lambda: image().to(torch.complex64),
    "int64": lambda: image().long(),
    "bool": lambda: image() > 0,
    "quint8": lambda: torch.quantize_per_tensor(image(), 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*uantiz")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_are_refused_by_name(model, kind):
    with pytest.raises(ValueError, match=rf"^image 1 must be .*{kind}"):
        model.eval()([image(), UNUSUAL[kind]()])
    if kind not in ("int64", "complex"):
        target = box(1.0, 1, 9, 9) | {"boxes": UNUSUAL[kind]()}
        with pytest.raises(ValueError, match=r"^target 1: boxes must be"):
            model.train()([image(), image()], [box(1.0, 1, 9, 9), target])


def test_complex_labels_are_refused(model):
    target = box(1.0, 1, 9, 9) | {"labels": torch.ones(1, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"^target 0: labels must be integers \[1\], got torch\.complex64"):
        model.train()([image()], [target])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_refused(model, dtype, value):
    bad = image().to(dtype)
    bad[2, 5, 7] = bad[2, 6, 0] = value
    message = r"^image 1 has 2 values that are not finite or above 1e\+09, .* channel 2, row 5, column 7$"
    with pytest.raises(ValueError, match=message):
        model.eval()([image(), bad])


@pytest.mark.parametrize("value", [1.1e9, -1.1e9, 3e38])
def test_values_that_are_no_pixels_are_refused(model, value):
    """They are finite, and their losses are not."""
    bad = image()
    bad[0, 0, 3] = value
    with pytest.raises(ValueError, match=r"^image 0 has 1 values .*, the first at channel 0, row 0, column 3$"):
        model.train()([bad], [box(1.0, 1, 9, 9)])


def test_large_pixels_have_finite_losses(model):
    for pixels in (image(1e9), image(-1e9), image(6e4).half()):
        losses = model.train()([pixels], [box(1.0, 1, 9, 9)])
        assert all(loss.isfinite() for loss in losses.values()), losses
    model.eval()([image(1e9)])


@pytest.mark.parametrize(("height", "width", "small"), [(45, 3000, "15 x 1000"), (3000, 40, "1000 x 13")])
def test_a_narrow_image_is_refused_where_no_feature_would_be_left(height, width, small):
    model = FasterRCNN("vgg16", 2, box_head=_Head(512 * 49), box_representation_size=8)
    message = rf"^image 1 of {height} x {width} pixels becomes {small} .*needs 16 pixels a side: .*raise max_size$"
    narrow = torch.rand(3, height, width)
    for mode in (model.eval(), model.train()):
        with pytest.raises(ValueError, match=message):
            mode([image(), narrow], [box(1.0, 1, 9, 9)] * 2)
    with pytest.raises(ValueError, match=r"needs 16 pixels a side, got images \[1, 3, 15, 40\]"):
        model.extract_features(torch.rand(1, 3, 15, 40))


class _Head(nn.Sequential):
    """In place of VGG16's own, of 120 million parameters."""

    def __init__(self, size):
        super().__init__(nn.Flatten(), nn.Linear(size, 8))


@pytest.mark.parametrize("name", sorted(set(backbones.NAMED) - {"resnet101_fpn", "resnet50_fpn_v2"}))
def test_least_side_is_the_least_that_works(name):
    backbone = backbones.build(name)[0].eval()
    least = backbones.least_side(backbone)
    backbone(torch.rand(1, 3, least, 64))
    if least > 1:
        with pytest.raises(RuntimeError):
            backbone(torch.rand(1, 3, least - 1, 64))


@pytest.mark.parametrize("seed", range(20))
def test_least_side_of_random_chains(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return int(torch.randint(most + 1, (), generator=generator))

    layers = []
    for _ in range(1 + draw(4)):
        kernel, stride, dilation = 1 + draw(3), 1 + draw(2), 1 + draw(1)
        padding = draw(kernel // 2)
        convolution = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
        pool = nn.MaxPool2d((kernel, 1), (stride, 1), (padding, 0), dilation)
        layers.append(nn.Sequential((convolution, pool)[draw(1)], nn.ReLU()))
    chain = nn.Sequential(*layers)
    least = backbones.least_side(chain)
    chain(torch.rand(1, 1, least, 500))
    if least > 1:
        with pytest.raises(RuntimeError):
            chain(torch.rand(1, 1, least - 1, 500))


def test_a_box_that_vanishes_when_resized_is_refused(model):
    """One unit in the last place wide, where that unit is twice as large after resizing: half of them have no width."""
    refused = 0
    for corner in torch.linspace(61.0, 63.0, 40):
        target = box(corner.item(), 1.0, torch.nextafter(corner, corner + 1).item(), 60.0)
        message = None
        try:
            losses = model.train()([image()], [target])
        except ValueError as error:
            message = str(error)
            refused += 1
        assert all(loss.isfinite() for loss in losses.values())
        assert message is None or message.startswith("target 0: box 0 has no area after resizing: [6")
    assert 0 < refused < 40


@pytest.mark.parametrize(("sizes", "min_size", "warned"), [((64.0,), 120, False), ((128.0, 256.0), 120, True)])
def test_images_without_an_anchor_inside_are_warned_of(sizes, min_size, warned):
    """Their losses of region proposals would be 0 for a whole run without a word."""
    generator = fastdet.AnchorGenerator((sizes,), offset=8.0, rounded=False)
    model = FasterRCNN("small", 2, rpn_anchor_generator=generator, min_size=min_size, max_size=160)
    batch = [torch.rand(3, 120, 160)], [box(20.0, 20, 80, 90)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = model.train().inspect(*batch)["anchors_inside"]
        model.eval().inspect(*batch)
    messages = [str(warning.message) for warning in caught]
    assert bool(inside.any()) != warned
    assert len(messages) == warned
    assert all(message.startswith("image 0 of 120 x 160 pixels after resizing has no anchor") for message in messages)


@pytest.mark.parametrize("seed", range(20))
def test_whether_an_anchor_lies_inside_is_what_the_anchors_show(seed):
    draw = random.Random(seed)
    levels = draw.choice([1, 3])
    sizes = tuple((draw.uniform(5, 90),) for _ in range(levels))
    strides = tuple(draw.choice([4, 8, 16]) for _ in range(levels))
    generator = fastdet.AnchorGenerator(sizes, strides=strides, offset=draw.choice([0, 8]), rounded=draw.random() < 0.5)
    height, width = draw.randint(8, 120), draw.randint(8, 120)
    grids = [(-(-height // stride), -(-width // stride)) for stride in strides]
    every = torch.cat(
        [
            anchors.grid_anchors(cell, grid, (stride, stride))
            for cell, grid, stride in zip(generator.cell_anchors(), grids, strides, strict=True)
        ]
    )
    expected = bool(anchors.inside(every, torch.tensor([[height, width]])).any())
    assert anchors.has_anchor_inside(generator, (height, width)) == expected


def test_anchors_are_not_looked_at_where_a_program_is_recorded(monkeypatch):
    """Their values are not there."""
    calls = []
    monkeypatch.setattr(preprocessing, "warn_of_images_without_anchors", lambda *_: calls.append(1))
    model = FasterRCNN("small", 2, min_size=64, max_size=64).train()
    batch = [torch.rand(3, 64, 64)], [box(4.0, 4, 40, 40)]
    model.preprocess(*batch)
    monkeypatch.setattr(preprocessing.ops, "is_recorded", lambda _: True)
    model.preprocess(*batch)
    assert calls == [1]


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_of_tv_tensors_are_taken_by_their_format(form):
    model, image = small_detector(), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    corners = torch.tensor([[10.0, 12.0, 40.0, 50.0], [3.0, 5.0, 20.0, 30.0]])
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(64, 64))
    boxes = functional.convert_bounding_box_format(boxes, new_format=form)
    labels = torch.tensor([1, 2])
    targets = [{"boxes": value, "labels": labels} for value in (corners, boxes)]
    plain, wrapped = (model.preprocess([tv_tensors.Image(image)], [target])[1] for target in targets)
    assert torch.equal(plain.boxes, wrapped.boxes)
    assert type(wrapped.boxes) is torch.Tensor


def test_images_in_0_to_255_are_a_warning_unless_the_mean_is_so_too():
    target = {"boxes": torch.tensor([[10.0, 12.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    model = small_detector()
    with pytest.warns(UserWarning, match=r"far above 1.*0\.\.1.*uint8 in 0\.\.255"):
        model.preprocess([image], [target])
    for settings in ({"image_mean": (120.0, 110.0, 100.0), "image_std": (58.0, 57.0, 56.0)}, {}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = image if settings else image.to(torch.uint8)
            small_detector(**settings).preprocess([given], [target])
