"""The command line, in this process, on small VOC trees of drawn shapes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdet.cli import data as data_options
from fastdet.cli.main import main
from fastdet.cli.options import parse
from fastdet.data import VOC, JoinedImages, Shapes
from fastdet.data.images import MAX_PIXELS
from fastdet.engine import build_model, checkpoint, detect
from fastdet.engine.buckets import plan_graphs
from fastdet.engine.evaluate import evaluate
from tests.helpers.cli import message
from tests.helpers.voc import SMALL


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree, and the folder of a run of two epochs on it."""
    tree, run = pristine, tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--data", f"voc:{tree}", "--out", str(run), "--epochs", "2", *SMALL]) == 0
    return tree, run


def fails(capsys: pytest.CaptureFixture[str], arguments: list[object], *parts: str, code: int = 2) -> None:
    """The command exits with `code` and one line on stderr that has all parts."""
    line = message(capsys, *arguments, code=code)
    for part in parts:
        assert str(part) in line


def test_train_writes_everything(trained):
    _, run = trained
    names = {".lock", "AP.png", "best.pth", "detections.png", "last.pth", "loss.png", "metrics.csv", "result.json"}
    names |= {"settings.json", "validation.csv"}
    assert {path.name for path in run.iterdir()} == names
    result = json.loads((run / "result.json").read_text())
    assert {"AP", "AP50", "AP75", "VOC07", "VOC12", "minutes_of_training"} <= set(result)
    assert (result["images"], result["epochs"], result["backbone"]) == (3, 2, "small")
    assert set(result["classes"]) <= set(Shapes.class_names)
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    with Image.open(run / "detections.png") as picture:
        assert picture.width > 2 * 64


def test_graphs_are_chosen_once(tree, tmp_path, monkeypatch, capsys):
    def plan(model, data, settings, processes):
        return plan_graphs(model.settings, settings, data)

    monkeypatch.setattr("fastdet.cli.commands.choose_graphs", plan)
    monkeypatch.setattr("fastdet.engine.trainer.choose_graphs", None)
    assert main(["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "0", *SMALL]) == 0
    assert "each one CUDA graph, of images padded to 64 x 64" in capsys.readouterr().out


def test_two_epochs_of_the_detector_and_two_more_are_four(tmp_path, tree):
    def run(out: str, *options: str) -> dict[str, torch.Tensor]:
        arguments = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / out), "--epochs", "4", *SMALL, *options]
        assert main(arguments) == 0
        return checkpoint.load(tmp_path / out / "last.pth")["model"]

    straight = run("straight")
    half = run("resumed", "--stop-after", "2")
    resumed = run("resumed", "--resume")
    written = [json.loads((tmp_path / out / "settings.json").read_text()) for out in ("straight", "resumed")]
    saved = [parse(["train", "--settings", str(tmp_path / out / "settings.json")]) for out in ("straight", "resumed")]
    assert written[0]["epochs"] == written[1]["epochs"] == 4
    assert saved[0].stop_after is saved[1].stop_after is None
    assert any(not torch.equal(straight[name], half[name]) for name in straight)
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name


def test_a_run_is_repeated_from_its_settings(trained, tmp_path, capsys):
    _, run = trained
    again = ["train", "--settings", str(run / "settings.json"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = (checkpoint.load(folder / "last.pth") for folder in (run, tmp_path / "again"))
    for name, value in first["model"].items():
        assert torch.equal(second["model"][name], value)
    assert main([*again[:-1], str(tmp_path / "other"), "--lr", "0.001", "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main(["compare", str(run), str(tmp_path / "other")]) == 0
    table = {line.split("  ")[0]: line.split()[-2:] for line in capsys.readouterr().out.splitlines()}
    assert table.keys() == {
        "run",
        "epochs",
        "lr",
        "epochs done",
        "last loss",
        "best AP",
        "AP50 then",
        "of epoch",
        "images/s",
    }
    assert table["lr"] == ["0.01", "0.001"]
    assert table["epochs done"] == ["2", "1"]
    fails(capsys, ["train", "--settings", run / "metrics.csv"], "metrics.csv", "not the settings.json of a run")
    fails(capsys, ["train", "--settings"], "--settings")
    fails(capsys, ["compare", tmp_path], "settings.json: not the settings of a run: No such file or directory")


def test_settings_of_a_run_and_options_beside_them(trained, capsys):
    _, run = trained
    file, out = str(run / "settings.json"), ["--out", "x"]
    saved = parse(["train", "--settings", file, *out])
    assert parse(["train", f"--settings={file}", *out]) == saved
    for given in (["--data", "voc:a", "--data=voc:b"], ["--data=voc:a", "--data", "voc:b"]):
        options = parse(["train", *given, "--settings", file, *out])
        assert [place.path for place in options.data] == ["a", "b"]
        assert options.min_size == saved.min_size
        again = parse(options.arguments)
        assert again == options
    assert parse(["train", "--settings", file, *out, "--val-data", "voc:c"]).data == saved.data
    fails(capsys, ["eval", "--settings", file, "--data", "voc:a", "--weights", "b"], "--settings")


def test_eval_prints_a_table_and_repeats_the_result(trained, tmp_path, capsys):
    tree, run = trained
    arguments = ["eval", "--data", f"voc:{tree}", "--weights", str(run / "best.pth"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].split() == ["AP", "AP50", "AP75", "VOC07", "VOC12"]
    names = checkpoint.load_model(run / "best.pth")[1]
    assert [line.split()[0] for line in output[1:]] == [*names, "mean"]
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (run, tmp_path))
    assert before["AP"] == after["AP"]
    assert before["classes"] == after["classes"]


def test_detect_draws_pictures(trained, tmp_path, capsys):
    tree, run = trained
    second = tmp_path / "second"
    second.mkdir()
    Image.new("RGB", (90, 50), "white").save(second / "test_0.png")
    images = [tree / "JPEGImages/test_0.jpg", tree / "JPEGImages/test_1.jpg", second / "test_0.png"]
    arguments = ["detect", *map(str, images), "--weights", str(run / "last.pth"), "--out", str(tmp_path / "drawn")]
    assert main([*arguments, "--score", "0.1"]) == 0
    drawn = ["test_0.png", "test_1.png", "test_0_2.png"]
    output = capsys.readouterr().out.splitlines()
    for line, image, name in zip(output, images, drawn, strict=True):
        assert line.startswith(f"{image}: ")
        assert line.endswith(f"-> {tmp_path / 'drawn' / name}")
    with Image.open(tmp_path / "drawn" / "test_0_2.png") as picture:
        assert picture.size == (90, 50)


def test_a_run_on_a_data_set_in_cocos_format(tree, tmp_path, capsys):
    voc = VOC(tree, "trainval")
    images = [{"id": index, "file_name": voc.image_path(index).name} for index in range(len(voc))]
    boxes = [(index, box) for index in range(len(voc)) for box in voc[index][1]["boxes"].tolist()]
    categories = [{"id": 1, "name": "shape"}]
    annotations = [
        {"image_id": index, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]} for index, (x1, y1, x2, y2) in boxes
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    data = f"coco:{tree / 'JPEGImages'},{tmp_path / 'all.json'}"
    run = ["train", "--data", data, "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    fails(capsys, run, "--val-data", "no split")
    assert main([*run, "--val-data", data]) == 0
    assert checkpoint.load_model(tmp_path / "run/last.pth")[1] == ("shape",)
    capsys.readouterr()
    assert main(["eval", "--data", data, "--weights", str(tmp_path / "run/last.pth")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "shape"


def test_detect_turns_photos_as_viewers_show_them(trained, tmp_path):
    _, run = trained
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 40)).save(tmp_path / "photo.jpg", exif=exif)
    command = [
        "detect",
        str(tmp_path / "photo.jpg"),
        "--weights",
        str(run / "last.pth"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    (drawn,) = (tmp_path / "out").iterdir()
    width, height = Image.open(drawn).size
    assert width < height


def test_options_of_the_data_reach_the_data_set(trained, monkeypatch):
    tree, run = trained
    found = {}

    class Recorded(VOC):
        def __init__(self, *arguments, **options):
            found.update(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(data_options, "VOC", Recorded)
    command = ["eval", "--data", f"voc:{tree}", "--weights", str(run / "last.pth"), "--zero-based", "--orientation"]
    assert main([*command, "stored"]) == 0
    assert found == {"zero_based": True, "orientation": "stored", "max_pixels": MAX_PIXELS, "problems": None}


def test_detect_and_evaluate_leave_the_model_as_it_was(trained):
    tree, run = trained
    model, class_names = checkpoint.load_model(run / "last.pth")
    assert not model.training
    model.train()
    (found,) = detect(model, [tree / "JPEGImages/test_0.jpg"])
    assert model.training
    assert found.image.shape == (3, 64, 64)
    assert len(found.boxes) == len(found.labels) == len(found.scores)
    found.boxes.add_(1)  # not a tensor of the inference mode, which would refuse
    shapes = JoinedImages([Shapes(3, size=64, seed=4)], class_names, leave_out_others=True)
    single, triple = (evaluate(model, shapes, class_names, batch_size=size) for size in (1, 3))
    for first, second in zip(single.predictions, triple.predictions, strict=True):
        torch.testing.assert_close(first["scores"], second["scores"])


def test_options_reach_model_and_recipe(tree, tmp_path):
    arguments = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "0", *SMALL]
    arguments += [
        "--classes",
        "star,square,circle,triangle",
        "--aspect-ratios",
        "1",
        "--lr",
        ".3",
        "--augmentation",
        "none",
    ]
    arguments += ["--schedule", "step", "--milestones", "3,5", "--set", "box_pooling='align'", "--limit", "3"]
    assert main(arguments) == 0
    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    assert saved["class_names"] == ("star", "square", "circle", "triangle")
    assert (saved["lr"], saved["augmentation"], saved["milestones"], saved["images"]) == (0.3, "none", (3, 5), 3)
    model, _ = checkpoint.load_model(tmp_path / "run" / "last.pth")
    assert model.settings.box_pooling == "align"
    assert model.settings.rpn_anchor_generator.sizes == ((12, 20, 32),)
    assert model.settings.rpn_anchor_generator.aspect_ratios == ((1,),)
    assert model.settings.rpn_anchor_generator.strides == (8,)


def test_a_feature_pyramid_trains_and_comes_back(tree, tmp_path, capsys):
    run = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    run[run.index("small")] = "mobilenet_v2_fpn"
    run[run.index("12,20,32")] = "8,12,16,24,32,48,64,96"
    assert main(run) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if "minutes" not in line]
    model, _ = checkpoint.load_model(tmp_path / "run" / "last.pth")
    assert model.settings.rpn_anchor_generator.sizes == ((8, 12), (16, 24), (32, 48), (64, 96))
    assert model.settings.box_pooling == "align"
    assert main(["eval", "--data", f"voc:{tree}", "--weights", str(tmp_path / "run/last.pth")]) == 0
    assert capsys.readouterr().out.splitlines() == trained[trained.index(next(x for x in trained if "AP75" in x)) :]
    run[run.index("8,12,16,24,32,48,64,96")] = "8,16,32"
    fails(capsys, [*run, "--overwrite"], "mobilenet_v2_fpn has 4 feature levels", "got 3")


def test_a_run_starts_from_another_runs_weights(trained, tree, tmp_path, capsys):
    _, run = trained
    first = checkpoint.load(run / "last.pth")["model"]
    train = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL, "--overwrite"]
    start = ["--weights", str(run / "last.pth"), "--stop-after", "0"]
    assert main([*train, *start]) == 0
    model = checkpoint.load(tmp_path / "run" / "last.pth")["model"]
    # What was trained with the batch's statistics goes on frozen, as pretrained weights do.
    assert all(torch.equal(first[name], value) for name, value in model.items())
    other = [*train, *start, "--classes", "circle,square,triangle,star,none"]
    fails(capsys, other, "--weights", "last.pth", "has the classes ('circle'", "--replace-predictor")
    another = [*train, *start]
    another[another.index("12,20,32")] = "16,32,48"
    fails(capsys, another, "--weights", "last.pth", "has the anchors", "(12.0, 20.0, 32.0)", "(16.0, 32.0, 48.0)")
    assert main([*other, "--replace-predictor"]) == 0
    replaced = checkpoint.load(tmp_path / "run" / "last.pth")["model"]
    assert replaced["roi_heads.box_predictor.cls_score.weight"].shape[0] == 6
    assert torch.equal(replaced["rpn.head.cls_logits.weight"], first["rpn.head.cls_logits.weight"])
    fails(capsys, [*train, "--replace-predictor"], "--replace-predictor", "--weights")
    bare = tmp_path / "bare.pth"
    torch.save(first, bare)
    fails(capsys, [*other, "--weights", bare], "--weights", "5 classes, the model 6", "replace_predictor")
    fails(capsys, [*train, "--weights", "a.pth", "--weights-backbone", "b.pth"], "not allowed with")
    fails(capsys, [*train, "--weights", tmp_path / "nowhere.pth"], "nowhere.pth")


def test_weights_of_the_other_option_name_it(trained, tree, tmp_path, capsys):
    backbone, detector = tmp_path / "vgg16.pth", trained[1] / "last.pth"
    other = {"net.weight": torch.zeros(1)}
    train = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "run", *SMALL]
    fails(capsys, [*train, "--weights-backbone", detector], "--weights takes this file")
    torch.save({"features.0.weight": torch.zeros(1)}, backbone)
    fails(capsys, [*train, "--weights", backbone], "--weights-backbone takes this file")
    torch.save(other, backbone)
    for option in ("--weights", "--weights-backbone"):
        assert "takes this file" not in message(capsys, *train, option, backbone)


def test_a_run_starts_from_weights_with_the_anchors_of_the_backbone(trained, tree, tmp_path):
    names = checkpoint.load(trained[1] / "last.pth")["class_names"]
    sizes = {"min_size": 64, "max_size": 64}
    architecture = {"backbone": "mobilenet_v2_fpn", "num_classes": len(names) + 1, "settings": sizes}
    start = {"architecture": architecture, "class_names": names, "model": build_model(architecture).state_dict()}
    checkpoint.save(tmp_path / "start.pth", start)
    train = ["train", "--data", f"voc:{tree}", "--min-size", "64", "--max-size", "64", "--stop-after", "0"]
    assert main([*train, "--weights", str(tmp_path / "start.pth"), "--out", str(tmp_path / "run")]) == 0
    model = checkpoint.load(tmp_path / "run" / "last.pth")["model"]
    assert all(torch.equal(value, model[name]) for name, value in start["model"].items() if "num_batches" not in name)


@pytest.mark.shared
def test_a_run_from_pretrained_weights_is_loaded_without_them(tree, tmp_path, shared_dir, capsys):
    """Pretrained, the backbone's BatchNorm is frozen; the checkpoint has to fit a model that is built without."""
    weights = shared_dir / "weights/mobilenet_v2_features.pth"
    size = ["--min-size", "64", "--max-size", "64", "--anchor-sizes", "16,32", "--set", "box_representation_size=32"]
    arguments = ["--data", f"voc:{tree}", "--epochs", "1", "--out", str(tmp_path / "run"), *size, "--device", "cpu"]
    arguments += ["--backbone", "mobilenet_v2"]
    assert main(["train", *arguments, "--weights-backbone", str(weights), "--set", "box_score_thresh=0.0"]) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if "minutes" not in line]
    assert main(["eval", "--data", f"voc:{tree}", "--weights", str(tmp_path / "run/last.pth")]) == 0
    assert capsys.readouterr().out.splitlines() == trained[trained.index(next(x for x in trained if "AP75" in x)) :]


def test_data_errors(tree, tmp_path, capsys):
    train = ["train", "--out", tmp_path / "run", "--epochs", "1", *SMALL]
    here = [*train, "--data", f"voc:{tree}"]
    fails(capsys, [*train, "--data", "voc:/nowhere/at/all"], "/nowhere/at/all")
    fails(capsys, [*train, "--data", tree], "--data", "voc:PATH")
    fails(capsys, [*here, "--train-split", "nonesuch"], "nonesuch")
    annotation = tree / "Annotations/trainval_3.xml"
    text = annotation.read_text()
    annotation.write_text(text[:-20])
    fails(capsys, here, "trainval_3.xml")
    annotation.write_text(text.replace("<name>", "<name>un", 1))
    annotation.write_text(text)
    assert not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_cut_short_names_the_file(tree, tmp_path, capsys, workers):
    image = tree / "JPEGImages/trainval_2.jpg"
    image.write_bytes(image.read_bytes()[:400])
    run = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "run", "--epochs", "1", *SMALL, "--workers", workers]
    capsys.readouterr()
    assert main([str(argument) for argument in run]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fastdet: {image}: the image cannot be decoded")


def test_option_errors(tree, tmp_path, capsys):
    train = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "run", "--epochs", "1", *SMALL]
    fails(capsys, [*train, "--set", "box_nms_tresh=.3"], "box_nms_tresh", "box_nms_thresh")
    fails(capsys, [*train, "--set", "box_nms_thresh=3"], "box_nms_thresh", "3")
    fails(capsys, [*train, "--set", "box_nms_thresh"], "--set", "NAME=VALUE")
    fails(capsys, [*train, "--set", "box_nms_thresh=a b"], "--set", "a b")
    fails(capsys, [*train, "--set", "rpn_anchor_generator=3"], "--anchor-sizes")
    fails(capsys, [*train, "--backbone", "resnet1"], "resnet1", "mobilenet_v2")
    fails(capsys, [*train, "--weights-backbone", "/nowhere.pth"], "/nowhere.pth")
    fails(capsys, [*train, "--anchor-sizes", "8,-3"], "--anchor-sizes", "8,-3")
    fails(capsys, [*train, "--aspect-ratios", "1e-9"], "--aspect-ratios: aspect_ratios")
    fails(capsys, [*train, "--max-size", "9"], "--max-size, --set: max_size must be at least min_size (64)")
    fails(capsys, [*train, "--milestones", "1.5"], "--milestones")
    fails(capsys, [*train, "--milestones", "1"], "--milestones: --schedule step needs them")
    fails(capsys, [*train, "--schedule", "step"], "--milestones: --schedule step needs them")
    fails(capsys, [*train, "--set", "min_size=40"], "--set min_size", "--min-size")
    weights = ["--set", "class_weights=(1,1,1,1,1)", "--class-weights", "balanced"]
    fails(capsys, [*train, *weights], "--set class_weights", "--class-weights")
    fails(capsys, [*train, "--batch-size", "0"], "batch_size", "0")
    fails(capsys, [*train, "--epochs", "many"], "--epochs", "many")
    fails(capsys, [*train, "--limit", "0"], "--limit")
    fails(capsys, [*train, "--device", "toaster"], "--device: there are cpu and cuda, not 'toaster'")
    fails(capsys, [*train, "--resume"], tmp_path / "run/last.pth", "no such checkpoint")
    fails(capsys, [*train, "--unheard-of"], "--unheard-of", "see fastdet train --help")
    fails(capsys, ["train", "--out", "x"], "--data")
    fails(capsys, [], "COMMAND")
    fails(capsys, ["tarin"], "tarin")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_out_that_is_a_file(tree, tmp_path, capsys):
    (tmp_path / "file").touch()
    train = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "file", "--epochs", "1", *SMALL]
    fails(capsys, train, tmp_path / "file")


@pytest.mark.parametrize("name", ["settings.json", "metrics.csv", "validation.csv", "best.pth"])
def test_a_file_of_the_run_that_cannot_be_written(tree, tmp_path, capsys, name):
    (tmp_path / "run" / name / "full").mkdir(parents=True)
    run = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    assert main(run) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastdet: ")
    assert name in last


def test_a_run_is_not_overwritten_unasked(trained, capsys):
    tree, run = trained
    before = (run / "last.pth").read_bytes()
    train = ["train", "--data", f"voc:{tree}", "--out", run, "--epochs", "2", *SMALL]
    fails(capsys, train, run / "last.pth", "resume")
    fails(capsys, [*train, "--resume", "--lr", "0.5"], "lr is 0.5")
    assert (run / "last.pth").read_bytes() == before


def test_weights_errors(trained, tmp_path, capsys):
    tree, run = trained
    image = tree / "JPEGImages/test_0.jpg"
    bad = tmp_path / "bad.pth"
    for command in (["eval", "--data", f"voc:{tree}"], ["detect", image, "--out", tmp_path / "drawn"]):
        bad.unlink(missing_ok=True)
        fails(capsys, [*command, "--weights", bad], bad, "no such checkpoint")
        bad.write_bytes((run / "last.pth").read_bytes()[:-1000])
        fails(capsys, [*command, "--weights", bad], bad, "cut short")
        bad.write_text("hello")
        fails(capsys, [*command, "--weights", bad], bad, "not a checkpoint")
        content = checkpoint.load(run / "last.pth")
        content["architecture"]["num_classes"] += 1
        checkpoint.save(bad, content)
        fails(capsys, [*command, "--weights", bad], bad, "does not fit")
        torch.save({"model": content["model"]}, bad)
        fails(capsys, [*command, "--weights", bad], bad, "fastdet train", "it has no architecture, class_names")
    weights = ["--weights", run / "last.pth"]
    fails(capsys, ["detect", tmp_path / "no.jpg", "--out", tmp_path / "drawn", *weights], "no.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    fails(capsys, ["detect", tmp_path / "text.jpg", "--out", tmp_path / "drawn", *weights], "text.jpg", "decoded")
    fails(capsys, ["eval", "--data", f"voc:{tree}", "--split", "nonesuch", *weights], "nonesuch")


def test_losses_that_are_not_finite_exit_with_one(tree, tmp_path, capsys):
    train = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "run", "--epochs", "3", *SMALL]
    assert (
        main([str(argument) for argument in [*train, "--lr", "1e30", "--warmup-steps", "0", "--clip-norm", "0"]]) == 1
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert "not finite" in last
    assert "trainval_" in last


def test_help_is_printed(capsys):
    for arguments, part in ((["--help"], "--version"), (["train", "--help"], "passes over the data (8)")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert part in capsys.readouterr().out


def test_ctrl_c_exits_cleanly(tree, tmp_path):
    """In a process of its own, as a terminal does it; then the run can be resumed."""
    out = tmp_path / "run"
    arguments = ["train", "--data", f"voc:{tree}", "--out", str(out), "--epochs", "100000", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdet", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in a shell's background ignore interruptions, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = out / "metrics.csv"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 200) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate(timeout=30)[1]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.splitlines()[-1] == "fastdet: interrupted: --resume goes on from the state that is saved"
    assert checkpoint.load(out / "last.pth")["epoch"] >= 0
    evaluated = {"best.pth", "validation.csv"} if checkpoint.load(out / "last.pth")["epoch"] else set()
    names = {path.name for path in out.iterdir()}
    assert {".lock", "last.pth", "metrics.csv", *evaluated} <= names
    assert names <= {".lock", "last.pth", "metrics.csv", "best.pth", "settings.json", "validation.csv"}


@pytest.mark.parametrize("command", ["train", "eval", "demo"])
def test_without_pycocotools_nothing_is_trained_or_evaluated(tree, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    out = tmp_path / "run"
    arguments = {
        "train": ["--data", f"voc:{tree}", "--epochs", "1", *SMALL],
        "eval": ["--data", f"voc:{tree}", "--weights", "last.pth"],
        "demo": [],
    }
    fails(capsys, [command, "--out", out, *arguments[command]], "needs pycocotools", "pip install pycocotools")
    assert not out.exists()


def test_a_setting_of_earlier_versions(tree, tmp_path, capsys):
    train = ["train", "--data", f"voc:{tree}", "--out", tmp_path / "run", "--epochs", "0", *SMALL]
    fails(capsys, [*train, "--set", "mask_padding=True"], "mask_padding=True", "size_buckets")


def test_a_step_that_diverged_is_taken_again(tree, tmp_path, capsys):
    run = ["train", "--data", f"voc:{tree}", "--out", str(tmp_path / "run"), "--epochs", "3", *SMALL, "--ema", "0.5"]
    run += ["--lr", "1e9", "--clip-norm", "0", "--warmup-steps", "0", "--augmentation", "strong"]
    assert main(run) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "not finite" in last
    assert "fastdet replay" in last
    record = json.loads((tmp_path / "run/failure.json").read_text())
    assert len(record["indices"]) == len(record["seeds"]) == len(record["boxes"]) <= 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[: record["step"]]] == [f"step {k + 1}" for k in range(record["step"])]
    failed = lines[record["step"] - 1]
    assert "a loss or gradient is not finite" in failed
    assert record["images"] in failed
    assert f"loss_classifier {float(record['losses']['loss_classifier']):.3g}" in failed
    assert "not finite" in lines[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    fails(capsys, ["replay", tmp_path], "failure.json: not the record of a step: No such file or directory")
