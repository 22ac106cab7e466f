"""The documents agree with the repository: figures, names, paths, commands, and the README's script."""

import itertools
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from bench import report, tables
from tests.test_package import LAYERS

ROOT = Path(__file__).resolve().parents[1]
EPYC, H100 = "epyc-2-cores", "nvidia-h100-80gb-hbm3"
EPYC_TABLES = ["operations", "growth", "one_image", "whole_steps"]
RESULTS = ROOT / f"bench/results/{EPYC}.csv"
DOCUMENTS = [path for folder in (ROOT, ROOT / "docs") for path in sorted(folder.glob("*.md"))]
# The changelog names what was removed, too.
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]


def per_document(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


def code_in(text: str) -> list[str]:
    """What is set in backticks, in a line or a block."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.filterwarnings("ignore")
def test_the_script_of_the_readme_trains(monkeypatch, tmp_path, capsys):
    """The README's script, word for word, but for shorter training."""
    script = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    lines = [line for line in script.splitlines() if line.strip()]
    assert [line for line in lines if "import" in line] == ["import torch", "import fastdet"]
    assert len(lines) - 2 <= 11, "ten lines of training and one of detection"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shortened = script.replace("Shapes(500", "Shapes(6").replace("range(10)", "range(2)")
    assert shortened != script
    exec(compile(shortened, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])
    assert re.match(r"\{'boxes': .*'labels': .*'scores': ", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("README.md", {H100: ["worst_and_best"], EPYC: ["worst_and_best"]}),
        ("docs/benchmarks.md", {H100: ["gpu_steps", "gpu_operations"], EPYC: EPYC_TABLES}),
    ],
)
def test_tables_are_those_of_the_results(path, names):
    """`python -m bench.tables README.md docs/benchmarks.md` writes them."""
    text = (ROOT / path).read_text()
    assert re.findall(tables.MARKER, text) == [(results, name) for results in names for name in names[results]]
    assert tables.fill(text) == text
    for results in names:
        rows = report.read(ROOT / f"bench/results/{results}.csv")
        assert all(len(tables.TABLES[name](rows)) >= 1 for name in names[results])


@per_document(DOCUMENTS)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).is_file()] == []


@per_document(CURRENT)
def test_paths_exist(path):
    """Paths of the repository from its root, in backticks; `<op>` stands for any operation."""
    roots = "bench|docs|fastdet|kernels|tests|tools|\\.ci|\\.github"
    code = "\n".join(code_in(path.read_text()))
    paths = {found.replace("<op>", "nms") for found in re.findall(rf"(?<![\w/.-])(?:{roots})/[\w/.<>-]*", code)}
    assert [found for found in sorted(paths) if not (ROOT / found.rstrip(".")).exists()] == []


@per_document(CURRENT)
def test_names_exist(path):
    """Names written as `fastdet.<name>`."""
    names = {name for code in code_in(path.read_text()) for name in re.findall(r"\bfastdet(?:\.[a-zA-Z]\w*)+", code)}
    missing = []
    for name in sorted(names):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


@per_document(CURRENT)
def test_targets_of_make_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {name for code in code_in(path.read_text()) for name in re.findall(r"\bmake ([a-z-]+)", code)}
    assert used <= targets


@per_document(CURRENT)
def test_scripts_compile(path):
    for script in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        compile(script, path.name, "exec")


@per_document(CURRENT)
def test_modules_that_are_run_exist(path):
    used = {name for code in code_in(path.read_text()) for name in re.findall(r"python -m ([\w.]+)", code)}
    assert [name for name in sorted(used) if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_the_architecture_names_every_package_and_module():
    """`<op>` stands for each operation; files that begin with an underscore are left out; of the tests, the folders."""
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.+?) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastdet").glob("**/__init__.py")}
    packages = {str(folder) for folder in folders if folder.parts[:2] != ("fastdet", "kernels")}
    assert set(rows) == packages | {"kernels", "kernels/common", "bench", "tools", "tests"}
    operations = [path.stem for path in (ROOT / "fastdet/ops").glob("[!_]*.py")]
    for package, modules in rows.items():
        names = [name.strip("`") for name in modules.split()]
        named = [name.replace("<op>", op) for name in names for op in (operations if "<op>" in name else [""])]
        found = (ROOT / package).glob("*/*.py" if package == "tests" else "[!_]*.py")
        assert sorted(named) == sorted({path.parent.name if package == "tests" else path.stem for path in found})


def test_the_drawn_directions_of_imports_are_those_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    drawn = re.search(r"### Direction of imports\n\n```\n(.*?)```", text, re.DOTALL)[1]
    arrows: dict[str, set[str]] = {package: set() for package in LAYERS}
    for line in drawn.splitlines():
        groups = [group.strip().split(", ") for group in line.split("->")]
        for importing, imported in itertools.pairwise(groups):
            for package in importing:
                arrows[package].update(imported)

    def reachable(package: str) -> set[str]:
        return arrows[package].union(*map(reachable, arrows[package]))

    for package, allowed in LAYERS.items():
        assert arrows[package] <= allowed <= reachable(package), package
