"""The options that name data sets, `fastdet convert` and `fastdet lint`."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastdet
from fastdet.cli.data import open_data, open_training_data, parse_place
from fastdet.cli.main import main
from fastdet.cli.options import build_parser
from fastdet.cli.plan import DetectorOptions, plan_detector
from fastdet.cli.values import UserError
from fastdet.data import COCO, VOC, JoinedImages
from fastdet.engine import checkpoint
from fastdet.engine.defaults import collect_objects
from fastdet.engine.evaluate import evaluate
from tests.helpers.cli import message
from tests.helpers.voc import SMALL
from tests.helpers.yolo import write_yolo


def opened(*options: object) -> tuple[JoinedImages, JoinedImages | None]:
    return open_training_data(build_parser().parse_args(["train", "--out", "x", *map(str, options)]))


def test_splits_of_a_voc_tree(tree):
    train, val = opened("--data", f"voc:{tree}")
    assert val is not None
    assert train.ids == tuple(f"trainval_{k}" for k in range(6))
    assert val.ids == tuple(f"test_{k}" for k in range(3))
    assert train.class_names == val.class_names
    assert opened("--data", f"voc:{tree}", "--train-split", "test", "--val-split", "trainval")[1].ids == train.ids


def test_a_share_of_the_images_to_evaluate_on(tree):
    data = ["--data", f"voc:{tree}", "--val-share", "0.34"]
    train, val = opened(*data)
    assert (len(train), len(val)) == (4, 2)
    assert sorted(train.ids + val.ids) == [f"trainval_{k}" for k in range(6)]
    assert opened(*data, "--split-seed", "1")[1].ids != val.ids
    with pytest.raises(UserError, match=r"--val-share: 1 image\(s\) cannot be split"):
        opened(*data, "--limit", "1")
    with pytest.raises(UserError, match="--val-share and --val-split: only one goes"):
        opened(*data, "--val-split", "test")


def test_several_data_sets_are_joined(tree):
    train, val = opened("--data", f"voc:{tree}", "--data", "shapes:4,7", "--val-data", "shapes:2", "--limit", "8")
    assert train.ids == (*(f"trainval_{k}" for k in range(6)), "shapes_7_0", "shapes_7_1")
    assert val.ids == ("shapes_0_0", "shapes_0_1")
    assert val.class_names == train.class_names
    labels = {name: k for k, name in enumerate(train.class_names, start=1)}
    shapes = fastdet.data.Shapes(4, seed=7)
    expected = [labels[shapes.class_names[label - 1]] for label in shapes[0][1]["labels"].tolist()]
    assert train[6][1]["labels"].tolist() == expected


def test_a_class_with_a_comma_is_named_in_quotes(capsys):
    given = ["eval", "--weights", "x", "--data", "shapes:1", "--classes"]
    parser = build_parser()
    assert parser.parse_args([*given, 'a, "b, c",5" d,"e""f"']).classes == ("a", "b, c", '5" d', 'e"f')
    for text in ('"a,b', '"a"b', ",", "a\nb"):
        assert "is not a list of different names" in message(capsys, *given, text)


def test_classes_are_a_subset_in_the_order_given(tree):
    train, val = opened("--data", f"voc:{tree}", "--classes", "star,circle")
    assert train.class_names == val.class_names == ("star", "circle")
    assert {label for index in range(6) for label in train.target(index)["labels"].tolist()} <= {1, 2}


def test_data_without_anything_to_evaluate_on(capsys, tmp_path):
    train = ["train", "--out", tmp_path / "run", *SMALL]
    assert "--val-share" in message(capsys, *train, "--data", "shapes:4")
    for text in ("shapes:x", "shapes:", "coco:folder", "yolo:", "xml:y"):
        assert "is not of the form" in message(capsys, *train, "--data", text)
    assert "number between 0 and 1" in message(capsys, *train, "--data", "shapes:4", "--val-share", "1")


def test_data_without_images(capsys, tmp_path):
    train = ["train", "--out", tmp_path / "run", *SMALL]
    assert "shapes:0: there are no images" in message(capsys, *train, "--data", "shapes:0", "--val-data", "shapes:2")
    line = message(capsys, *train, "--data", "shapes:2", "--val-data", "shapes:0,3")
    assert line == "fastdet: shapes:0,3: there are no images"


def test_a_run_describes_what_it_trains(tree, tmp_path, capsys):
    run = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    run = [*run[: run.index("--anchor-sizes")], *run[run.index("--anchor-sizes") + 2 :]]
    assert main([*run, "--classes", "star,circle,square"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: 6 images to train on, 3 to evaluate on, 64 x 64 pixels"
    assert lines[1].startswith("boxes: star ")
    assert lines[2] == "resizing: shorter side 64, longer at most 64 pixels (given)"
    assert lines[3].startswith("anchors: sides ")
    assert "(chosen for the objects), reach " in lines[3]
    assert lines[4] == "weights: random"
    assert lines[5].startswith("training: small, 1 epochs of 3 steps of 2 images, sgd with rate 0.01")
    saved = checkpoint.load(tmp_path / "run/last.pth")
    assert saved["class_names"] == ("star", "circle", "square")
    assert saved["augmentation"] == "flip"
    # From the same data the same anchors, or the run could not go on.
    assert main([*run, "--classes", "star,circle,square", "--resume"]) == 0


def test_random_weights_are_a_warning(tree, tmp_path, capsys):
    run = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "0", *SMALL[2:]]
    options = ["--backbone", "mobilenet_v2_fpn", "--anchors", "default"]
    run = [*run[: run.index("--anchor-sizes")], *run[run.index("--anchor-sizes") + 2 :]]
    assert main([*run, *options]) == 0
    error = capsys.readouterr().err
    assert "--weights-backbone IMAGENET1K_V1" in error
    assert "--weights FILE" in error


def plan(data: str, *options: str):
    parsed = build_parser().parse_args(["train", "--out", "x", "--data", data, "--val-share", "0.2", *options])
    data = open_training_data(parsed)[0]
    return plan_detector(DetectorOptions.of(parsed), collect_objects(data), data.class_names)


def write_objects(root: Path, sides: list[int], size: tuple[int, int]) -> str:
    """A data set in COCO's format of one square object an image."""
    root.mkdir()
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(len(sides))]
    boxes = [{"image_id": k, "category_id": 1, "bbox": [5 + k, 7, side, side]} for k, side in enumerate(sides)]
    for k in range(len(sides)):
        Image.new("L", size).save(root / f"{k}.png")
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (root / "all.json").write_text(json.dumps(content))
    return f"coco:{root},{root / 'all.json'}"


@pytest.mark.parametrize("backbone", ["mobilenet_v2_fpn", "mobilenet_v2", "resnet50_fpn", "vgg16"])
@pytest.mark.parametrize(("side", "size"), [(8, (640, 480)), (40, (640, 480)), (450, (640, 480)), (60, (200, 300))])
def test_the_default_detector_reaches_objects_of_any_size(tmp_path, backbone, side, size):
    data = write_objects(tmp_path / "set", [side - k % 3 for k in range(12)], size)
    chosen = plan(data, "--backbone", backbone)
    settings = chosen.architecture["settings"]
    unchanged = plan(data, "--backbone", backbone, "--anchors", "default", "--min-size", str(settings["min_size"]))
    assert "max_size" not in unchanged.architecture["settings"]
    assert chosen.overlaps.mean() >= unchanged.overlaps.mean()
    # Cells of 16 pixels are too coarse for the smallest.
    if side > 8 or backbone.endswith("fpn"):
        assert (chosen.overlaps >= 0.5).mean() >= 0.8
    if backbone in ("mobilenet_v2", "vgg16"):
        assert settings["rpn_min_size"] <= side / 2


def test_images_are_resized_to_what_the_objects_need(tmp_path):
    for number, (side, expected) in enumerate(((8, 800), (24, 480), (30, 384), (400, 320))):
        chosen = plan(write_objects(tmp_path / f"set{number}", [side] * 6, (640, 480)))
        settings = chosen.architecture["settings"]
        assert settings["min_size"] == expected
        assert settings["max_size"] == round(expected * 1333 / 800)
    largest = plan(f"coco:{tmp_path}/set0,{tmp_path}/set0/all.json", "--max-size", "700")
    assert largest.architecture["settings"]["min_size"] == largest.architecture["settings"]["max_size"] == 700


def test_balanced_class_weights(tree):
    chosen = plan(f"voc:{tree}", "--class-weights", "balanced", "--classes", "star,circle,none,square")
    weights = chosen.architecture["settings"]["class_weights"]
    counts = [int((chosen.objects.labels == label).sum()) for label in range(1, 5)]
    assert counts[2] == 0
    assert weights[0] == weights[3] == 1
    products = [weight * count for weight, count in zip(weights[1:], counts, strict=True) if count]
    assert products == pytest.approx([sum(counts) / 3] * 3)
    assert "class_weights" not in plan(f"voc:{tree}").architecture["settings"]


def test_anchors_that_are_given_are_taken(tmp_path):
    data = write_objects(tmp_path / "set", [40, 50, 60, 30, 20], (200, 200))
    given = plan(data, "--anchor-sizes", "10,20,30,40", "--aspect-ratios", "1,2")
    assert given.architecture["anchors"]["sizes"] == ((10,), (20,), (30,), (40,))
    with pytest.raises(UserError, match="--anchors auto: it does not go with"):
        plan(data, "--anchor-sizes", "10,20,30,40", "--anchors", "auto")


def test_training_that_cannot_learn_is_an_error_before_the_first_step(tree, tmp_path, capsys):
    run = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "run", "--epochs", "1", *SMALL]
    error = message(capsys, *run, "--anchor-sizes", "100,200")
    assert "no anchor lies inside any image, the largest 64 x 64 after resizing" in error
    assert not (tmp_path / "run/last.pth").exists()


def test_convert_and_back(tree, tmp_path, capsys):
    out = tmp_path / "copy"
    assert main(["convert", "--data", f"voc:{tree}", "--data", "shapes:2", "--to", f"coco:{out}"]) == 0
    assert "8 images" in capsys.readouterr().out
    train = opened("--data", f"voc:{tree}", "--data", "shapes:2", "--val-data", "shapes:1")[0]
    copy = COCO(out / "images", out / "instances.json")
    assert copy.class_names == train.class_names
    for index in range(8):
        assert torch.equal(copy[index][0], train[index][0])
        assert copy[index][1]["boxes"].tolist() == train[index][1]["boxes"].tolist()
        assert copy[index][1]["labels"].tolist() == train[index][1]["labels"].tolist()
    assert "something already" in message(capsys, "convert", "--data", "shapes:2", "--to", f"coco:{out}")
    assert "coco:DIR" in message(capsys, "convert", "--data", "shapes:2", "--to", out)


def test_zero_based_corners_of_the_data_to_evaluate_on_alone(tree):
    data = ["--data", "shapes:2", "--val-data", f"voc:{tree}"]
    first, other = (opened(*data, *options)[1].target(0)["boxes"] for options in ((), ("--zero-based",)))
    assert (other - first).tolist() == [[1, 1, 0, 0]] * len(first)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"fastdet {fastdet.__version__}"


def test_a_run_is_not_resumed_on_other_images(tree, tmp_path, capsys):
    run = ["train", "--data", f"voc:{tree}", "--val-share", "0.5", "--out", tmp_path / "run", "--epochs", "2", *SMALL]
    assert main([*map(str, run), "--stop-after", "1"]) == 0
    assert "data is" in message(capsys, *run, "--resume", "--split-seed", "3")
    assert "data is" in message(capsys, *run, "--resume", "--zero-based")
    assert main([*map(str, run), "--resume"]) == 0


def test_lists_without_trainval(tree, tmp_path):
    lists = tree / "ImageSets/Main"
    (lists / "trainval.txt").rename(lists / "train.txt")
    train, val = opened("--data", f"voc:{tree}")
    assert (len(train), len(val)) == (6, 3)
    (lists / "test.txt").rename(lists / "val.txt")
    assert opened("--data", f"voc:{tree}")[1].ids == val.ids


def test_options_that_do_not_go_together(tree, tmp_path, capsys):
    train = ["train", "--out", tmp_path / "run", "--data", f"voc:{tree}", *SMALL]
    shapes = ["train", "--out", tmp_path / "run", "--data", "shapes:4", "--val-data", "shapes:2", *SMALL]
    assert "has no splits, but 'x'" in message(capsys, *shapes, "--train-split", "x")
    assert "different names" in message(capsys, *train, "--classes", "star,star")
    assert "--split-seed 3: it goes with --val-share" in message(capsys, *train, "--split-seed", "3")
    assert "--zero-based: it is of VOC's files" in message(capsys, *shapes, "--zero-based")
    assert "--orientation stored: drawn shapes have none" in message(capsys, *shapes, "--orientation", "stored")
    huge = [argument for argument in train if argument != "12,20,32"]
    huge.insert(huge.index("--anchor-sizes") + 1, "1e300,2")
    assert "--anchor-sizes" in message(capsys, *huge)
    assert "is not of the form" in message(capsys, *train, "--data", f"shapes:5,{'9' * 50}")
    assert main([*map(str, train), "--epochs", "0"]) == 0
    weights = ["--weights", tmp_path / "run/last.pth"]
    assert "has no class 'stra'" in message(capsys, "eval", "--data", f"voc:{tree}", *weights, "--classes", "stra")


def test_of_trainval_val_is_a_part(tree):
    """As in VOC2012, which has no list of the test images."""
    lists = tree / "ImageSets/Main"
    (lists / "test.txt").unlink()
    for name, stems in (("train", range(4)), ("val", range(4, 6))):
        (lists / f"{name}.txt").write_text("\n".join(f"trainval_{k}" for k in stems))
    train, val = opened("--data", f"voc:{tree}")
    assert (len(train), len(val)) == (4, 2)
    assert len(opened("--data", f"voc:{tree}", "--val-data", "shapes:2")[0]) == 6
    assert sum(map(len, opened("--data", f"voc:{tree}", "--val-share", "0.5"))) == 6
    (lists / "test.txt").write_text("test_0")
    assert [len(part) for part in opened("--data", f"voc:{tree}")] == [6, 1]
    assert [len(part) for part in opened("--data", f"voc:{tree}", "--val-split", "val")] == [4, 2]


def test_training_without_a_box_is_an_error(tmp_path, capsys):
    write_yolo(tmp_path, {"train": 2, "val": 1})
    run = ["train", "--data", f"yolo:{tmp_path}", "--out", tmp_path / "run", "--epochs", "0", *SMALL]
    for path in (tmp_path / "labels/val").iterdir():
        path.write_text("")
    assert main([*map(str, run)]) == 0
    assert "no image to evaluate on has a box that is to be found" in capsys.readouterr().err
    for path in (tmp_path / "labels/train").iterdir():
        path.write_text("")
    assert "2 images without a box that is to be found" in message(capsys, *run, "--overwrite")
    message(capsys, "lint", "--data", f"yolo:{tmp_path}", "--out", tmp_path / "lint", code=1)


def test_without_a_best_evaluation_the_average_of_the_weights_is_evaluated_at_the_end(tmp_path, monkeypatch):
    write_yolo(tmp_path, {"train": 4, "val": 1})
    for path in (tmp_path / "labels/val").iterdir():
        path.write_text("")
    evaluated = []

    def keep_weights(model, *arguments, **options):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr("fastdet.cli.commands.evaluate", keep_weights)
    run = ["train", "--data", f"yolo:{tmp_path}", "--out", f"{tmp_path}/run", "--epochs", "1", "--ema", "0.9", *SMALL]
    assert main(run) == 0
    assert not (tmp_path / "run/best.pth").exists()
    within, final = evaluated
    for name, value in checkpoint.load_model(tmp_path / "run/last.pth")[0].state_dict().items():
        assert torch.equal(value, within[name]), name
        assert torch.equal(value, final[name]), name
    raw = checkpoint.load(tmp_path / "run/last.pth")["model"]
    assert not all(torch.equal(value, within[name]) for name, value in raw.items())


def test_evaluation_of_some_classes(tree):
    options = build_parser().parse_args(["eval", "--weights", "x", "--data", f"voc:{tree}", "--classes", "star,square"])
    names = ("triangle", "square", "circle", "star")
    data = open_data(options, options.data, "val", None, names)
    assert data.class_names == names
    counts = Counter(label for index in range(len(data)) for label in data.target(index)["labels"].tolist())
    whole = VOC(tree, "test", names)
    expected = Counter(label for index in range(len(whole)) for label in whole.target(index)["labels"].tolist())
    assert counts == {label: expected[label] for label in (2, 4)}
    assert sum(counts.values()) < sum(expected.values())


def test_the_home_folder(tree, tmp_path, monkeypatch):
    """A shell does not replace ~ behind `voc:`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["convert", "--data", f"voc:~/{tree.name}", "--to", "coco:~/copy"]) == 0
    place = parse_place("coco:~/copy/images,~/copy/instances.json")
    assert len(COCO(place.path, place.annotations)) == 6
    assert parse_place("yolo:~/data.yaml").path == str(tmp_path / "data.yaml")
