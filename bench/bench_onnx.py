"""Detection in one image on a CPU, in the ways that there are: eager, compiled, and exported, in ONNX Runtime."""

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import whole_step
from bench.costs import Call
from bench.timing import Times
from bench.whole_step import Case
from fastdet import export

CPU = torch.device("cpu")
CASES = [Case(*size, 1, False, torch.float32, CPU) for size in (("mobilenet_v2", 320, 480), ("vgg16", 600, 901))]
ABSENT = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def run_onnx(content: Path, inputs: dict[str, Any]) -> Call:
    """A call of an .onnx file in ONNX Runtime, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(content), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def exported_fastdet(case: Case, folder: Path) -> Call:
    """Our detector in ONNX Runtime, on a resized image; gives boxes, scores, labels and count."""
    model = whole_step.build_fastdet(case)
    batch = model.preprocess(whole_step.scene(case)[0])[0]
    path = folder / "fastdet.onnx"
    export.export_onnx(model, path, height=case.height, width=case.width)
    images = torch.stack(whole_step.scene(case)[0])
    inputs = dict(zip(export.INPUTS, (images, batch.sizes, batch.scales), strict=True))
    return run_onnx(path, {name: value.numpy() for name, value in inputs.items()})


def exported_torchvision(case: Case, folder: Path) -> Call:
    """torchvision's detector in ONNX Runtime, exported as its documentation does; gives boxes, labels and scores."""
    model = whole_step.build_torchvision(case, whole_step.build_fastdet(case))
    images = whole_step.scene(case)[0]
    path = folder / "torchvision.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), str(path), dynamo=False, opset_version=11, input_names=["image"])
    return run_onnx(path, {"image": images[0].numpy()})


def detector(model: nn.Module, case: Case) -> Call:
    """A call of a model on the image."""
    images = whole_step.scene(case)[0]
    return torch.inference_mode()(partial(model, images))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares what there is without a GPU")
@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ways(take_turns: Callable[..., list[Times]], record: Callable[..., None], case: Case) -> None:
    ours, compiled = (whole_step.build_fastdet(case) for _ in range(2))
    theirs = whole_step.build_torchvision(case, ours)
    torch._dynamo.reset()
    compiled.compile(fullgraph=True)
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "torchvision, ONNX Runtime": exported_torchvision(case, Path(folder)),
            "ONNX Runtime": exported_fastdet(case, Path(folder)),
        }
    calls |= {
        "torchvision, eager": detector(theirs, case),
        "eager": detector(ours, case),
        "compiled": detector(compiled, case),
    }
    expected = ours(whole_step.scene(case)[0])[0]["scores"]
    found = calls["ONNX Runtime"]()[1][0]
    torch.testing.assert_close(torch.from_numpy(found[: len(expected)]), expected.detach(), rtol=1e-3, atol=1e-3)
    # Its anchors lie a little elsewhere.
    assert len(calls["torchvision, ONNX Runtime"]()[2]) == pytest.approx(len(expected), rel=0.25)
    times = dict(zip(calls, take_turns(list(calls.values())), strict=True))
    for way in ("eager", "compiled", "ONNX Runtime"):
        peer = times["torchvision, ONNX Runtime" if way == "ONNX Runtime" else "torchvision, eager"]
        size = f"{case.name} {case.height} x {case.width}"
        record(f"one image, {way}", size, "float32", times[way], peer)
