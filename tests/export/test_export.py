"""Exported detectors find what the eager one finds: ten drawn images, .pt2 and ONNX in ONNX Runtime."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdet
from fastdet import export, ops
from fastdet.cli.main import main
from fastdet.data import Shapes
from fastdet.engine import checkpoint
from fastdet.export.pt2 import trace_program
from tests.helpers.checks import awkward_boxes, random_boxes
from tests.helpers.detectors import TinyBackbone, small_detector
from tests.helpers.exported import FORMATS, assert_same, laid_out, loaded, needs_onnx, write
from tests.helpers.weights import calibrate_batchnorm, randomize_heads

ROOT = Path(__file__).resolve().parents[2]
CANVAS = (64, 96)


class TinyPyramid(nn.Module):
    """Two levels, of strides 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.out_channels, self.strides = 8, (8, 16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images)
        return {"0": fine, "1": self.coarse(fine)}


def _anchors(*levels: tuple[float, ...], offset: float = 0.0) -> fastdet.AnchorGenerator:
    return fastdet.AnchorGenerator(sizes=levels, offset=offset)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one level, max": ("small", {"rpn_anchor_generator": _anchors((12, 20, 32), offset=4.0), "rpn_min_size": 10.0}),
    "one level, align": (
        "small",
        {
            "rpn_anchor_generator": _anchors((12, 20, 32), offset=4.0),
            "box_pooling": "align",
            "box_aligned": True,
            "box_sampling_ratio": 0,
            "box_detections_per_img": 8,
            "image_format": "bgr255",
            "image_mean": (100.0, 110.0, 120.0),
            "image_std": (50.0, 60.0, 70.0),
        },
    ),
    "pyramid, max on one level": (
        TinyPyramid,
        {
            "rpn_anchor_generator": _anchors((12, 20), (32, 48)),
            "box_pooling": "max",
            "box_featmap_names": ("1",),
            "box_num_convs": 1,
        },
    ),
    "pyramid, align": (
        "resnet18_fpn",
        {"rpn_anchor_generator": _anchors((8,), (16,), (32,), (48,), (64,)), "box_pooling": "align"},
    ),
}


def make_detector(backbone: Any, changes: dict[str, Any]) -> fastdet.FasterRCNN:
    torch.manual_seed(1)
    common = {
        "min_size": 64,
        "max_size": 96,
        "size_buckets": (CANVAS,),
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_test": 30,
        "box_representation_size": 32,
        "box_score_thresh": 0.3,
    }
    built = backbone if isinstance(backbone, str) else backbone()
    model = fastdet.FasterRCNN(built, 5, **{**common, **changes})
    randomize_heads(model, lambda name, weight: (3 if "cls_score" in name else 1) / weight[0].numel() ** 0.5)
    items = [Shapes(8, size=64, seed=5)[k] for k in range(8)]
    calibrate_batchnorm(model, lambda: model([image for image, _ in items], [target for _, target in items]))
    return model.eval()


def ten_images() -> list[Tensor]:
    """Every other one is cut to a shape that the detector resizes."""
    images = [Shapes(10, size=64, seed=2)[k][0] / 255 for k in range(10)]
    return [image[:, :48] if k % 2 else image for k, image in enumerate(images)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[fastdet.FasterRCNN, Path]]:
    """The detector of a case and its file of a format, made once."""
    models: dict[str, fastdet.FasterRCNN] = {}
    folder = tmp_path_factory.mktemp("exported")

    def get(case: str, suffix: str) -> tuple[fastdet.FasterRCNN, Path]:
        if case not in models:
            models[case] = make_detector(*CASES[case])
        path = folder / f"{case}{suffix}"
        if not path.exists():
            write(models[case], path)
        return models[case], path

    return get


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_ten_images_give_the_same_detections(exported, case, suffix):
    model, path = exported(case, suffix)
    images = ten_images()
    with torch.no_grad():
        eager = model(images)
    inputs = laid_out(images, model)
    counts = assert_same(loaded(path)(*inputs), eager, images, inputs[1])
    assert min(counts) > 0
    assert len(set(counts)) > 1, "the images differ"


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_file_takes_batches_of_any_size(exported, suffix):
    model, path = exported("one level, max", suffix)
    run, images = loaded(path), ten_images()
    for batch in (1, 2, 5):
        inputs = laid_out(images[:batch], model)
        with torch.no_grad():
            eager = model(images[:batch])
        assert_same(run(*inputs), eager, images[:batch], inputs[1])


@pytest.mark.parametrize("suffix", FORMATS)
def test_shapes_do_not_depend_on_the_data_and_nan_finds_nothing(exported, suffix):
    model, path = exported("one level, align", suffix)
    images, sizes, scales = laid_out(ten_images()[:2], model)
    images[1] = torch.nan
    found = loaded(path)(images, sizes, scales)
    assert [tuple(value.shape) for value in found] == [(2, 8, 4), (2, 8), (2, 8), (2,)]
    assert found[3][0] > 0
    assert found[3][1] == 0
    assert all(not value[1].any() for value in found)


@needs_onnx
@pytest.mark.parametrize("case", CASES)
def test_an_onnx_file_is_of_standard_operators(exported, case):
    import onnx

    _, path = exported(case, ".onnx")
    whole = onnx.load(path)
    onnx.checker.check_model(whole, full_check=True)
    assert {node.domain for node in whole.graph.node} == {""}
    assert not whole.functions
    assert [(opset.domain, opset.version) for opset in whole.opset_import] == [("", export.OPSET)]
    kinds = {node.op_type for node in whole.graph.node}
    assert {"NonMaxSuppression", "RoiAlign" if "align" in case else "MaxRoiPool"} <= kinds
    first = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in whole.graph.input}
    assert first == dict.fromkeys(export.INPUTS, "batch")
    assert tuple(value.name for value in whole.graph.output) == export.OUTPUTS


def test_a_pt2_needs_the_import_of_fastdet(exported):
    model, path = exported("one level, align", ".pt2")
    code = f"import torch; print(len(torch.export.load({str(path)!r}).module()(*map(torch.load, 'isc'))))"
    for name, value in zip("isc", laid_out(ten_images()[:3], model), strict=True):
        torch.save(value, path.parent / name)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        here = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", code], cwd=path.parent, env=here, capture_output=True, text=True)

    imported = run(f"import fastdet; {code}")
    assert imported.stdout.strip() == "4", imported.stderr
    bad = run(code)
    assert bad.returncode == 1
    assert "torch.ops.fastdet" in bad.stderr
    assert "import the custom op" in bad.stderr


def test_the_model_is_left_as_it_was(tmp_path):
    one_level = {"rpn_anchor_generator": _anchors((12, 20)), "box_featmap_names": ("0",)}
    model = fastdet.FasterRCNN(TinyBackbone(), 3, min_size=64, max_size=96, **one_level)
    model.train()
    model.backbone[1].eval()
    export.export_pt2(model, tmp_path / "folder/model.pt2")
    assert model.training
    assert model.roi_heads.training
    assert not model.backbone[1].training
    assert (tmp_path / "folder/model.pt2").stat().st_size > 0


def test_a_callers_autocast_does_not_become_part_of_the_file(exported, tmp_path):
    model, _ = exported("one level, max", ".pt2")
    with torch.autocast("cpu", torch.bfloat16):
        export.export_pt2(model, tmp_path / "model.pt2")
    images = ten_images()[:2]
    inputs = laid_out(images, model)
    with torch.no_grad():
        eager = model(images)
    assert_same(loaded(tmp_path / "model.pt2")(*inputs), eager, images, inputs[1])


def test_the_size_of_the_images():
    settings = fastdet.TORCHVISION
    assert export.input_size(settings) == (800, 1344)
    assert export.input_size(fastdet.DETECTRON2)[0] == 800, "the size of evaluation"
    assert export.input_size(settings, 1344, 800) == (1344, 800)
    assert export.input_size(settings, width=64) == (800, 64)
    assert export.input_size(fastdet.VGG16) == (600, 1000)
    with pytest.raises(export.ExportError, match="height must be a positive multiple of 32, got 100"):
        export.input_size(settings, 100)
    with pytest.raises(export.ExportError, match="width must be a positive"):
        export.input_size(settings, width=0)
    with pytest.raises(export.ExportError, match=r"height must be a positive multiple of 32, got 96\.0"):
        export.input_size(settings, height=96.0)
    small = settings.override(size_buckets=((640, 640),))
    with pytest.raises(export.ExportError, match=r"size_buckets.*give height and width"):
        export.input_size(small)
    assert export.input_size(small, 640, 640) == (640, 640)
    assert export.input_size(settings.override(size_buckets=((1000, 1350),))) == (1000, 1350), "no multiples of 32"


def test_half_precision_is_refused(tmp_path):
    model = fastdet.FasterRCNN(TinyBackbone(), 3).half()
    with pytest.raises(TypeError, match="float32"):
        export.export_pt2(model, tmp_path / "model.pt2")


class Suppress(nn.Module):
    def __init__(self, iou_threshold: float, max_keep: int) -> None:
        super().__init__()
        self.settings = iou_threshold, max_keep

    def forward(self, boxes: Tensor, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ops.nms_padded(boxes, scores, *self.settings, valid))


class Pool(nn.Module):
    def __init__(self, pool: Callable[..., Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor]:
        return (self.pool(features, boxes, valid),)


def in_onnx_runtime(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    import onnxruntime

    from fastdet.export.onnx_operators import TABLE

    names = [f"in{k}" for k in range(len(inputs))]
    exported = torch.onnx.export(
        module.eval(),
        inputs,
        dynamo=True,
        custom_translation_table=TABLE,
        opset_version=18,
        input_names=names,
        verbose=False,
    )
    given = zip(names, map(Tensor.numpy, inputs), strict=True)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, dict(given))]


@needs_onnx
@pytest.mark.parametrize(("iou_threshold", "max_keep"), [(0.3, 40), (1 / 3, 5), (0.7, 40), (0.0, 3), (1.0, 40)])
def test_suppression_decides_alike(iou_threshold, max_keep):
    """Ties, IoU at the threshold, and boxes that are inverted, empty, NaN or infinite."""
    boxes = torch.stack([random_boxes(40), random_boxes(40, side=40.0).round(), random_boxes(40, side=12.0).round()])
    boxes[0, :11], boxes[1, 20:31] = awkward_boxes(), awkward_boxes()
    scores = (torch.rand(3, 40) * 20).round()
    valid = torch.rand(3, 40) < 0.8
    valid[2] = False
    expected = ops.nms_padded(boxes, scores, iou_threshold, max_keep, valid)
    index, count = in_onnx_runtime(Suppress(iou_threshold, max_keep), boxes, scores, valid)
    assert torch.equal(index, expected.index)
    assert torch.equal(count, expected.count)


@needs_onnx
@pytest.mark.parametrize("kind", ["max", "align", "aligned", "adaptive"])
def test_pooling_is_the_same(kind):
    """Corners at half cells, outside and crossed; padding; and, of max-pool, bit for bit."""
    features = torch.randn(2, 3, 9, 11)
    boxes = (torch.rand(2, 30, 4) * 240 - 30).div(4).round() * 4
    valid = torch.rand(2, 30) < 0.8

    def pool(features: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        if kind == "max":
            return ops.batched_roi_pool(features, boxes, 3, 1 / 8, valid)
        ratio = 0 if kind == "adaptive" else 2
        return ops.batched_roi_align([features], boxes, 3, [1 / 8], ratio, kind == "aligned", valid)

    if kind != "max":
        boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2])
    (found,) = in_onnx_runtime(Pool(pool), features, boxes, valid)
    expected = pool(features, boxes, valid)
    assert not found[~valid].any()
    if kind == "max":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


ARCHITECTURE: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 5,
    "anchors": checkpoint.describe_anchors("small", sizes=(12, 20, 32)),
    "settings": {"min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 20},
}


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    model = checkpoint.build_model(ARCHITECTURE)
    content = {"architecture": ARCHITECTURE, "class_names": Shapes.class_names, "model": model.state_dict()}
    checkpoint.save(tmp_path / "last.pth", content)
    return tmp_path / "last.pth"


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_command_writes_what_finds_the_same(weights_file, tmp_path, capsys, suffix):
    path = tmp_path / f"out/model{suffix}"
    assert main(["export", "--weights", str(weights_file), "--to", str(path), "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert f"{path}: images [B, 3, 64, 64]" in output.out
    assert "circle, square, triangle, star" in output.out
    assert ("import fastdet" in output.out) == (suffix == ".pt2")
    assert not output.err
    model, _ = checkpoint.load_model(weights_file)
    images = [Shapes(3, size=64)[k][0] / 255 for k in range(3)]
    inputs = torch.stack(images), torch.full((3, 2), 64), torch.ones(3)
    with torch.no_grad():
        assert_same(loaded(path)(*inputs), model(images), images, inputs[1])


def test_the_command_names_what_is_wrong(weights_file, tmp_path, capsys, monkeypatch):
    def fails(weights: Path, to: Path, *options: str) -> str:
        assert main(["export", "--weights", str(weights), "--to", str(to), *options]) == 2
        output = capsys.readouterr().err
        assert len(output.splitlines()) == 1, output
        return output

    assert all(part in fails(weights_file, tmp_path / "a.trt") for part in ("--to", "a.trt", ".pt2", ".onnx"))
    assert "no such checkpoint" in fails(tmp_path / "none.pth", tmp_path / "a.pt2")
    (tmp_path / "file").touch()
    output = fails(weights_file, tmp_path / "file/a.pt2")
    assert all(part in output for part in ("--to", "file/a.pt2", "cannot be written"))
    assert "--height" in fails(weights_file, tmp_path / "a.pt2", "--height", "0")
    monkeypatch.setitem(sys.modules, "onnx", None)
    output = fails(weights_file, tmp_path / "a.onnx")
    assert all(part in output for part in ("--to", "ONNX needs onnx", "pip install onnx"))


def test_exported_programs_have_no_batchnorm():
    """It is folded into the convolutions; the model keeps its own."""
    model = small_detector(box_num_convs=1).train()
    modes = [layer.training for layer in model.modules()]
    program = trace_program(model, 64, 96)
    targets = [str(node.target) for node in program.graph.nodes]
    assert [target for target in targets if "norm" in target] == []
    assert sum("conv2d" in target for target in targets) == sum(isinstance(x, nn.Conv2d) for x in model.modules())
    assert [layer.training for layer in model.modules()] == modes
    assert isinstance(model.backbone[1], nn.BatchNorm2d)
