"""Evaluation and detection with a stand-in detector that finds one box in each image."""

import sys

import pytest
import torch
from PIL import Image
from torch import nn

from fastdet.data import DataError
from fastdet.engine import detect
from fastdet.engine.evaluate import evaluate
from tests.helpers.detectors import NUM_CLASSES, small_detector, small_scene

BOX = torch.tensor([[2.0, 2, 12, 12]])


class OneBox(nn.Module):
    """Finds `BOX` as class 1 everywhere; one of its modules is frozen in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer, self.frozen = nn.Linear(1, 1), nn.BatchNorm2d(1).eval()
        self.calls = []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_inference_mode_enabled()))
        return [{"boxes": BOX.clone(), "labels": torch.ones(1).long(), "scores": torch.tensor([0.9])} for _ in images]


def dataset(*labels):
    """An image with `BOX` for each label."""
    ignore = torch.zeros(1, dtype=torch.bool)
    return [(torch.rand(3, 16, 16), {"boxes": BOX, "labels": torch.tensor([k]), "ignore": ignore}) for k in labels]


def test_all_metrics_by_value():
    model = OneBox()
    evaluation = evaluate(model, dataset(1, 1, 2), ["cat", "dog", "cow"], batch_size=2)
    assert model.calls == [(1, False, True)] * 3
    summary = evaluation.summary()
    assert list(summary) == ["AP", "AP50", "AP75", "VOC07", "VOC12", "classes"]
    # Two of three detections are true; "dog" is never found, "cow" has no ground truth.
    assert summary["classes"]["cat"]["VOC12"] == pytest.approx(1.0)
    assert summary["classes"]["dog"] == {"AP": 0, "AP50": 0, "VOC07": 0, "VOC12": 0}
    assert summary["classes"]["cow"] == dict.fromkeys(("AP", "AP50", "VOC07", "VOC12"))
    assert summary["VOC12"] == pytest.approx(0.5)
    assert summary["AP"] == pytest.approx(evaluation.coco.ap)
    assert evaluation.table().splitlines()[3:] == [
        "cow        -       -               -       -",
        f"mean{summary['AP']:8.3f}{summary['AP50']:8.3f}{summary['AP75']:8.3f}{summary['VOC07']:8.3f}   0.500",
    ]


def test_every_module_keeps_its_mode(tmp_path):
    model = OneBox().train()
    model.frozen.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, dataset(1), ["cat"])
    assert [module.training for module in model.modules()] == modes
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    (found,) = detect(model, [tmp_path / "a.png"])
    assert [module.training for module in model.modules()] == modes
    assert (found.path, found.image.shape, found.labels.tolist()) == (tmp_path / "a.png", (3, 16, 20), [1])
    found.boxes.add_(1)  # not a tensor of the inference mode, which would refuse


def test_names_are_those_of_the_data_set():
    class Named(list):
        class_names = ("cat", "dog", "cow")

    model, data = OneBox(), Named(dataset(1, 1, 2))
    with pytest.raises(ValueError, match=r"label 2 is 'cow', and 'dog' in the data set"):
        evaluate(model, data, ["cat", "cow", "dog"])
    assert model.calls == []
    assert evaluate(model, data, ["cat", "dog"]).summary()["classes"]["cat"]["VOC12"] == pytest.approx(1.0)


def test_without_pycocotools_nothing_is_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    model = OneBox()
    with pytest.raises(ImportError, match=r"pip install pycocotools"):
        evaluate(model, dataset(1), ["cat"])
    assert model.calls == []


class Sized(torch.utils.data.Dataset):
    """Images of three sizes in turn, with nothing in them."""

    sizes = tuple((64 + 10 * (k % 3), 90) for k in range(8))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.rand(3, *self.sizes[index], generator=torch.Generator().manual_seed(index))
        return image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("workers", [0, 1])
def test_detections_do_not_depend_on_the_batch(workers):
    model, data, calls = small_detector(rpn_min_size=1.0, box_score_thresh=0.0).eval(), Sized(), []
    model.register_forward_pre_hook(lambda _, arguments: calls.append([image.shape for image in arguments[0]]))
    before = torch.get_rng_state()
    single, four = (evaluate(model, data, ["a", "b", "c"], batch_size=size, workers=workers) for size in (1, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(shapes) for shapes in calls] == [1] * 8 + [3, 3, 2]
    assert all(len(set(shapes)) == 1 for shapes in calls)
    assert sum(len(found["scores"]) for found in single.predictions) > 8
    for first, second in zip(single.predictions, four.predictions, strict=True):
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        expected = model([data[4][0]])[0]
    torch.testing.assert_close(single.predictions[4]["boxes"], expected["boxes"])


class Scenes(torch.utils.data.Dataset):
    """Seven images of two sizes, one without boxes."""

    ids = tuple(f"picture-{k}" for k in range(7))

    def __init__(self):
        scenes = [small_scene(seed) for seed in (1, 2, 3)]
        items = [item for scene in scenes for item in zip(*scene, strict=True)][:7]
        self.items = [(image, {"ignore": torch.zeros(len(t["labels"])).bool(), **t}) for image, t in items]
        self.sizes = [tuple(image.shape[1:]) for image, _ in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


CLASSES = [f"class {k}" for k in range(1, NUM_CLASSES)]


@pytest.fixture
def model():
    """With something to add up in each loss."""
    return small_detector(rpn_min_size=1.0, box_score_thresh=0.0)


def test_losses_are_those_of_one_batch_of_all_images(model):
    data = Scenes()
    data.items = [item for item in data.items if item[0].shape[1:] == (64, 80)]
    data.sizes, data.ids = [(64, 80)] * 5, data.ids[:5]
    found = evaluate(model, data, CLASSES, batch_size=2, compute_losses=True).losses
    images, targets = zip(*data.items, strict=True)
    seeded = [{**target, "seed": torch.tensor(2 * k)} for k, target in enumerate(targets)]
    with torch.inference_mode():
        expected, _ = model.eval()(images, seeded, return_losses=True)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    assert min(found.values()) > 0


def test_losses_repeat_and_change_nothing_else(model):
    data, modes = Scenes(), [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    first, again, single = (evaluate(model, data, CLASSES, batch_size=size, compute_losses=True) for size in (4, 4, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert first.losses == again.losses
    assert single.losses == pytest.approx(first.losses, rel=1e-5)
    plain = evaluate(model, data, CLASSES, batch_size=4)
    assert plain.losses is None
    for found, expected in zip(first.predictions, plain.predictions, strict=True):
        assert len(found["scores"])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_loss_does_not_take_names_the_image(model):
    data = Scenes()
    data.items[3][1]["labels"] = torch.full_like(data.items[3][1]["labels"], NUM_CLASSES)
    with pytest.raises(DataError, match=r"images picture-3: target 0: .*label"):
        evaluate(model, data, CLASSES, batch_size=1, compute_losses=True)
