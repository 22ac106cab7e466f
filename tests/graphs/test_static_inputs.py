"""Which bucket takes a batch, and what its static tensors hold then."""

import pytest
import torch

from fastdet.graphs import GraphedDetector
from fastdet.graphs.static_inputs import allocate_batch, choose_bucket
from tests.helpers.detectors import NUM_CLASSES, small_scene
from tests.helpers.graphs import MAX_BOXES, SHAPE, crop_padding, detector, record_inputs, trainer


def test_a_smaller_batch_leaves_nothing_of_the_last(monkeypatch):
    """Images padded further and fewer boxes: the model's losses on the same canvas."""
    inputs = record_inputs(monkeypatch)
    graphed, plain = trainer(max_boxes=8), detector()
    graphed.set_lr(0.0)
    images, targets = small_scene()
    graphed.step([image + 1 for image in images], targets)
    images = [image[:, :60, :60] for image in images]
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "labels": torch.tensor([1])}] * 3
    graphed.step_padded(*crop_padding(graphed.model, images, targets))
    expected, padded, _ = plain.preprocess(images, targets)
    batch, rows = inputs[-1]
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(rows.boxes[:, :1], padded.boxes)
    assert not rows.labels[:, 1:].any()


def test_the_smallest_bucket_that_holds_a_batch_is_chosen():
    buckets = [(1, 3, 64, 96), (1, 3, 96, 64), (1, 3, 128, 128), (4, 3, 64, 64), (4, 3, 128, 128)]
    for batch, size, exact, chosen in (
        (1, (64, 64), True, (1, 3, 64, 96)),
        (1, (65, 64), True, (1, 3, 96, 64)),
        (1, (97, 10), True, (1, 3, 128, 128)),
        (1, (97, 10), False, (1, 3, 128, 128)),
        (2, (64, 64), False, (4, 3, 64, 64)),
        (2, (65, 64), False, (4, 3, 128, 128)),
        (4, (60, 60), True, (4, 3, 64, 64)),
    ):
        assert choose_bucket(buckets, torch.zeros(batch, 3, *size), exact) == chosen
    # Of all images and pixels, not of the pixels of an image.
    assert choose_bucket([(8, 3, 60, 60), (1, 3, 80, 80)], torch.zeros(1, 3, 50, 50), exact=False) == (1, 3, 80, 80)


def test_a_batch_that_fits_no_bucket_is_refused():
    images, targets = small_scene()
    graphed = trainer(shape=[SHAPE, (1, 3, 64, 64)])
    with pytest.raises(ValueError, match=r"4 images, but at most 3 .*batch_shape \(4"):
        graphed.step([*images, images[0]], [*targets, targets[0]])
    with pytest.raises(ValueError, match=r"2 images, but steps are of \[1, 3\].*batch_shape \(2.*drop_last"):
        graphed.step(images[:2], targets[:2])
    with pytest.raises(ValueError, match=r"1 images padded to 96 x 88 .*batch_shape \(1, 3, 96, 88\).*max_size"):
        graphed.step(images[1:2], targets[1:2])
    with pytest.raises(ValueError, match=r"3 boxes, but .* max_boxes=2: .*max_boxes=3"):
        trainer(max_boxes=2).step(images, targets)
    with pytest.raises(ValueError, match="3 images, but 2 ids"):
        graphed.step(images, targets, ids=[1, 2])
    padded = crop_padding(trainer().model, images, targets)
    with pytest.raises(ValueError, match=r"sizes must be \[3, 2\] for 3 images, got None"):
        graphed.step_padded(padded[0], None, padded[2])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got torch.uint8"):
        graphed.step_padded(*(torch.zeros(SHAPE, dtype=torch.uint8), None, None))
    assert graphed.captured == ()
    assert graphed.losses() == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 96, 88), "batch_shape must be"),
        ((3, 3, 96, 0), "batch_shape must be"),
        ((3.0, 3, 96, 88), "batch_shape must be"),
        ([SHAPE, 5], "batch_shape must be"),
        (None, "batch_shape must be"),
        ((3, 1, 96, 88), "1 channels, but image_mean has 3"),
        ([], "empty"),
    ],
)
def test_invalid_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        trainer(shape=shape)


@pytest.mark.parametrize("size_buckets", [((128, 128),), ((64, 64), (96, 89)), [[97, 88]]])
def test_size_buckets_that_fit_no_shape_are_refused(size_buckets):
    model = detector(size_buckets=size_buckets)
    with pytest.raises(ValueError, match=r"size_buckets fits no batch_shape of \(3, 3, 96, 88\)"):
        trainer(model)
    with pytest.raises(ValueError, match=r"size_buckets fits no batch_shape of \(1, 3, 64, 64\)"):
        GraphedDetector(model.eval(), (1, 3, 64, 64))
    assert GraphedDetector(model.eval(), [(1, 3, 64, 64), (1, 3, 128, 128)]).captured == ()


def test_the_scene_is_what_the_bucket_is_for():
    batch, padded, _ = detector().preprocess(*small_scene())
    assert (tuple(batch.images.shape), padded.boxes.shape[1]) == (SHAPE, MAX_BOXES)
    assert NUM_CLASSES == 4


def test_static_images_lie_as_the_batches_that_fill_them():
    """Else each step would copy them into another order, and back for the backbone."""
    batch, _, _ = detector().preprocess(*small_scene())
    static = allocate_batch(SHAPE, batch.images)
    assert static.images.stride() == batch.images.stride()
    assert not static.images.any()
