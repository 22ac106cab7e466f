"""The layout of the package: what may import what, and which files an operation has."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import fastdet

ROOT = Path(__file__).resolve().parents[1]

# Imports run one way: what each package or single module of `fastdet` may import of the others.
LAYERS: dict[str, set[str]] = {
    "kernels": set(),
    "boxes": set(),
    "structures": set(),
    "preserve": set(),
    "safe_files": set(),
    "version": set(),
    "inputs": {"ops", "boxes"},
    "weights": {"safe_files"},
    "data": {"safe_files", "boxes"},
    "metrics": set(),
    "visualize": {"safe_files"},
    "ops": {"kernels", "boxes"},
    "interop": {"ops", "boxes", "weights"},
    "models": {"interop", "ops", "weights", "boxes", "structures", "inputs"},
    "graphs": {"models", "structures", "preserve"},
    "export": {"models", "ops", "weights"},
    "engine": {"graphs", "models", "preserve", "safe_files", "weights", "data", "metrics", "visualize"},
    "cli": {
        "engine",
        "export",
        "models",
        "weights",
        "data",
        "metrics",
        "visualize",
        "structures",
        "preserve",
        "safe_files",
        "version",
    },
}
# The entry points, which import everything.
EXEMPT = {"__init__", "__main__"}
MAX_LINES, MAX_FILES = 300, 13


class Source(NamedTuple):
    """A file, its syntax tree, and the package it belongs to: one of `LAYERS` or `EXEMPT`, or `bench` or `tools`."""

    path: str
    package: str
    tree: ast.Module


def parsed(folder: str, is_package: bool) -> Iterator[Source]:
    """Every Python file below a folder of the repository; links are not followed."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        yield Source(str(path.relative_to(ROOT)), folder if is_package else parts[0], ast.parse(path.read_text()))


@lru_cache(maxsize=1)
def library() -> list[Source]:
    """The files of fastdet and of its kernels, which lie behind a link."""
    return [*parsed("fastdet", is_package=False), *parsed("kernels", is_package=True)]


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports: members with their module, inside functions and by string too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            written = node.args[0] if node.args else None
            if isinstance(written, ast.JoinedStr):
                written = written.values[0]
            if isinstance(written, ast.Constant):
                yield node.lineno, str(written.value)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_definitions(tree: ast.Module) -> set[str]:
    """The private names that a file defines: functions, classes, variables, fields, and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return set(filter(is_private, names))


def test_each_package_has_its_layer():
    assert {source.package for source in library()} - EXEMPT == set(LAYERS)
    assert {package for allowed in LAYERS.values() for package in allowed} <= set(LAYERS)


def test_imports_run_one_way():
    """`LAYERS` allows all that is imported, and nothing else."""
    wrong, used = [], {package: set() for package in LAYERS}
    for source in library():
        if source.package in EXEMPT:
            continue
        for line, name in imports_of(source.tree):
            root, _, rest = name.partition(".")
            imported = rest.partition(".")[0]
            if root == "fastdet" and imported != source.package:
                used[source.package].add(imported)
                if imported not in LAYERS[source.package]:
                    wrong.append(f"{source.path}:{line}: {source.package} imports {name}")
    assert not wrong, "\n".join(wrong)
    assert used == LAYERS


def test_kernels_import_torch_and_triton_alone():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    wrong = []
    for source in library():
        if source.package == "kernels":
            for line, name in imports_of(source.tree):
                if name.partition(".")[0] not in allowed and not name.startswith("fastdet.kernels."):
                    wrong.append(f"{source.path}:{line}: {name}")
            used = [name for _, name in imports_of(source.tree)]
            used += [ast.unparse(node) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
            wrong += [f"{source.path}: {name}" for name in used if re.match(r"torch\.(library|nn|autograd)\b", name)]
    assert not wrong, "\n".join(wrong)


def test_private_names_stay_in_their_package():
    sources = [*library(), *parsed("bench", is_package=True), *parsed("tools", is_package=True)]
    defined: dict[str, set[str]] = {}
    for source in sources:
        defined.setdefault(source.package, set()).update(private_definitions(source.tree))
    wrong = []
    for source in sources:
        foreign = set().union(*defined.values()) - defined[source.package]
        for line, name in imports_of(source.tree):
            root, *parts = name.split(".")
            package = parts[0] if root == "fastdet" and parts else root
            if package != source.package and package in defined and any(map(is_private, parts)):
                wrong.append(f"{source.path}:{line}: imports {name}")
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Attribute) or node.attr not in foreign:
                continue
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                wrong.append(f"{source.path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute():
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "build"))]
    sources = [source for folder in folders for source in parsed(folder, is_package=True)]
    assert {"fastdet", "kernels", "bench", "tools", "tests"} <= {source.package for source in sources}
    relative = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_files_and_packages_are_small():
    paths = [Path(source.path) for source in library()]
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
    counts = {str(folder): sum(path.parent == folder for path in paths) for folder in {path.parent for path in paths}}
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_each_operation_has_its_five_files():
    operations = {path.stem for path in (ROOT / "fastdet/ops").glob("*.py") if not path.stem.startswith("_")}
    assert operations == {"box_iou", "match", "decode", "nms", "sample", "roi_pool", "roi_align"}
    of_each = "kernels/{}.py", "fastdet/ops/{}.py", "fastdet/ops/cpu/{}.py", "tests/ops/test_{}.py", "bench/bench_{}.py"
    paths = [form.format(name) for name in sorted(operations) for form in of_each]
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_importing_does_not_need_triton_or_plots():
    heavy = {"triton", "matplotlib", "pycocotools", "onnx", "onnxscript"}
    code = f"import sys, fastdet; print(sorted({heavy} & set(sys.modules)))"
    blocked = f"import sys; sys.modules['triton'] = None; {code}"
    result = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("[]", "['triton']")


def test_a_bare_import_of_kernels_names_the_package():
    result = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "fastdet.kernels" in result.stderr


def test_what_is_exported_is_there():
    for name in ("FasterRCNN", "train", "TrainSettings", "Targets", "Proposals", "Samples", "Detections", "ops"):
        assert name in fastdet.__all__
    assert all(hasattr(fastdet, name) for name in fastdet.__all__)
    assert all(hasattr(fastdet.ops, name) for name in fastdet.ops.__all__)
