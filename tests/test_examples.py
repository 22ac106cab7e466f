"""The examples, each as a script of its own at small size."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdet.data import VOC, Shapes, collate
from fastdet.engine import build_model, checkpoint, load_model
from fastdet.engine.evaluate import evaluate
from tests.helpers.voc import write_voc

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"plain_torch": "pycocotools", "accelerate_loop": "accelerate", "lightning_module": "pytorch_lightning"}


def run_example(name: str, out: Path, *options: object, processes: int = 1) -> str:
    """What an example prints; its files go beside `out`."""
    if importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"{NEEDED[name]} is not installed")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [str(ROOT / f"examples/{name}.py"), "--out", str(out), "--size", "64", *map(str, options)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def mean_loss(model: torch.nn.Module, data: Shapes | VOC) -> float:
    torch.manual_seed(0)
    with torch.no_grad():
        return float(sum(model.train()(*collate(data[index] for index in range(4))).values()))


def check_trained(out: Path, printed: str, train_set: Shapes | VOC, test_set: Shapes | VOC, pattern: str) -> None:
    """The losses fall, the checkpoint's weights are those that were trained, and the printed AP is theirs."""
    losses = [float(value) for value in re.findall(r"loss[= ]([\d.]+|nan|inf)", printed)]
    assert len(losses) >= 2
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0]
    model, class_names = load_model(out)
    assert class_names == tuple(train_set.class_names)
    ap50, digits = evaluate(model, test_set, class_names).coco.ap50, re.search(pattern, printed)[1]
    assert float(digits) == pytest.approx(ap50, abs=0.51 * 10.0 ** -len(digits.partition(".")[2]) + 1e-6)
    # Last, as it changes the statistics of the normalization.
    torch.manual_seed(0)
    assert mean_loss(model, train_set) < 0.9 * mean_loss(build_model(checkpoint.load(out)["architecture"]), train_set)


@pytest.mark.parametrize(
    ("name", "steps", "pattern"),
    [
        ("plain_torch", 20, r"(?m)^mean +\S+ +(\S+)"),
        ("accelerate_loop", 12, r"AP50 ([\d.]+)"),
        ("lightning_module", 20, r"AP50 +(\S+)"),
    ],
)
def test_an_example_trains_evaluates_and_saves(tmp_path, name, steps, pattern):
    out = tmp_path / "detector.pth"
    printed = run_example(name, out, "--steps", steps)
    check_trained(out, printed, Shapes(400, size=64), Shapes(50, size=64, seed=1), pattern)


def test_two_processes_evaluate_each_image_once(tmp_path):
    """On a data set in files, with an odd number of images to evaluate on."""
    tree, out = write_voc(tmp_path / "voc", {"train": 16, "val": 5}), tmp_path / "detector.pth"
    printed = run_example("accelerate_loop", out, "--steps", 12, "--data", f"voc:{tree}", processes=2)
    assert re.findall(r"of \d+ images", printed) == ["of 5 images"]
    check_trained(out, printed, VOC(tree, "train"), VOC(tree, "val"), r"AP50 ([\d.]+)")
