"""The layout of the package: what may import what, and which files an operation has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import fastdet

ROOT = Path(__file__).resolve().parents[1]


def imports_of(path: Path) -> set[str]:
    """The modules a file imports, relative ones spelled from `fastdet`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = node.module or ""
            if node.level:
                package = ("fastdet", *path.relative_to(ROOT / "fastdet").parts[: -node.level])
                prefix = ".".join(filter(None, (*package, prefix)))
            found |= {prefix, *(f"{prefix}.{alias.name}" for alias in node.names)}
    return found


def test_kernels_know_torch_and_triton_alone():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"torch\.(library|nn|autograd)", text), path.name
        roots = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", text, re.M)}
        assert roots <= {"torch", "triton", "collections", "typing", "math", "fastdet"}, path.name
        assert all(name.startswith("fastdet.kernels") for name in imports_of(path) if name.startswith("fastdet"))


def test_only_the_operations_reach_the_kernels():
    for path in (ROOT / "fastdet").glob("**/*.py"):
        if "kernels" in path.parts or "ops" in path.parts:
            continue
        reached = [name for name in imports_of(path) if name.startswith("fastdet.kernels")]
        assert not reached, f"{path.relative_to(ROOT)} imports {reached}"


def test_each_operation_has_its_four_files():
    operations = {path.stem for path in (ROOT / "fastdet" / "ops").glob("[a-z]*.py")}
    assert {"box_iou", "match", "decode", "nms", "sample", "roi_pool", "roi_align"} <= operations
    for name in operations:
        for path in (f"kernels/{name}.py", f"tests/ops/test_{name}.py", f"bench/bench_{name}.py"):
            assert (ROOT / path).is_file(), path


def test_importing_does_not_need_triton_or_plots():
    heavy = {"triton", "matplotlib", "pycocotools", "onnx", "onnxscript"}
    code = f"import sys, fastdet; print(sorted({heavy} & set(sys.modules)))"
    blocked = f"import sys; sys.modules['triton'] = None; {code}"
    result = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("[]", "['triton']")


def test_a_bare_import_of_kernels_says_why_it_fails():
    result = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "fastdet.kernels" in result.stderr


def test_what_is_exported_is_there():
    for name in ("FasterRCNN", "fasterrcnn_vgg16", "Targets", "Proposals", "Samples", "Detections", "ops"):
        assert name in fastdet.__all__
    assert all(hasattr(fastdet, name) for name in fastdet.__all__)
    assert all(hasattr(fastdet.ops, name) for name in fastdet.ops.__all__)
