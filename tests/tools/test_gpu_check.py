"""The runner of `make gpu-check`, on commands that need no GPU."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import ABSENT, FAILED, LATE, PASSED, Step


def python_step(source: str, name: str = "step", limit: float = 60.0, **more: Any) -> Step:
    return Step(name, [sys.executable, "-c", source], limit, **more)


def alive(pid: int) -> bool:
    try:
        # A killed child of a child is a zombie until it is reaped.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_fails_or_is_late_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    pids = tmp_path / "pids"
    stubborn = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(100)
"""
    steps = [
        python_step("print('3 passed in 1s')", "passes"),
        python_step("print('FAILED tests/test_x.py::test_y - no'); print('1 failed'); raise SystemExit(1)", "fails"),
        python_step(stubborn, "hangs", 3.0),
        python_step("", "absent", absent="there is no such tool"),
        Step("no such command", ["/no/such/command"], 5.0),
        python_step("import os; print(os.environ['COLOR'])", "last", environment={"COLOR": "green"}),
    ]
    results = gpu_check.run_all(steps, tmp_path)
    assert [result.outcome for result in results] == [PASSED, FAILED, LATE, ABSENT, FAILED, PASSED]
    assert results[0].lines == ["3 passed in 1s"]
    assert results[1].lines == ["FAILED tests/test_x.py::test_y - no", "1 failed"]
    assert results[5].lines == ["green"]
    assert 3 <= results[2].seconds < 10
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
    summary = (tmp_path / "summary.txt").read_text()
    assert re.search(
        r"^fails +FAILED +\d+\.\d  FAILED tests/test_x.py::test_y - no\n +1 failed\n", summary, re.MULTILINE
    )
    assert re.search(r"^absent +left out +0\.0  there is no such tool$", summary, re.MULTILINE)
    assert "==== last: passed" in (tmp_path / "logs.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", "logs.txt", "pids"}


def test_a_late_step_may_write_what_it_has(tmp_path: Path) -> None:
    part, whole = tmp_path / "part.csv", tmp_path / "bench.csv"
    writes = f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    time.sleep(100)
except KeyboardInterrupt:
    open({str(part)!r}, "w").write("op,us\\nnms,1\\n")
    print("interrupted")
"""
    adds = (part, whole)
    steps = [
        python_step(writes, limit=2.0, adds=adds),
        python_step(f"open({str(part)!r}, 'w').write('op,us\\nmatch,2\\n')", adds=adds),
    ]
    late, passed = gpu_check.run_all(steps, tmp_path)
    assert (late.outcome, late.lines) == (LATE, ["interrupted"])
    assert passed.outcome == PASSED
    assert whole.read_text() == "op,us\nnms,1\nmatch,2\n"
    assert not part.exists()


def test_the_last_steps_have_what_time_is_left(tmp_path: Path) -> None:
    start = time.monotonic()
    steps = [python_step("import time; time.sleep(100)", limit=90.0), python_step("print('never')")]
    results = gpu_check.run_all(steps, tmp_path, total=2.0)
    assert time.monotonic() - start < 15
    assert [result.outcome for result in results] == [LATE, ABSENT]
    assert results[1].lines == ["no time was left"]


def test_a_step_is_given_its_time(tmp_path: Path) -> None:
    (result,) = gpu_check.run_all([Step("s", [sys.executable, "-c", "print({seconds})"], 100.0)], tmp_path, total=50.0)
    assert 30 <= int(result.lines[0]) <= 35


def test_long_logs_are_cut_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LONGEST_LOG", 200)
    gpu_check.run_all([python_step("print('begin', 'x' * 10000, 'end')")], tmp_path)
    logs = (tmp_path / "logs.txt").read_text()
    assert "begin xxx" in logs
    assert "xxx end" in logs
    assert len(logs) < 600


def test_the_exit_status_is_zero_if_all_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    for steps, status in (
        ([python_step("pass"), python_step("", absent="no tool")], 0),
        ([python_step("raise SystemExit(3)")], 1),
    ):
        monkeypatch.setattr(gpu_check, "steps", lambda out, steps=steps: steps)
        monkeypatch.setattr(os, "environ", {"PYTHONPATH": "elsewhere"})
        assert gpu_check.main(["--out", str(tmp_path / "out")]) == status
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(gpu_check.ROOT), "elsewhere"]


def test_without_a_gpu_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "gpu-check needs a GPU that torch can use; there is none\n"
    assert not (tmp_path / "out").exists()


def test_every_step_names_files_that_exist(tmp_path: Path) -> None:
    steps = gpu_check.steps(tmp_path)
    named = {part for step in steps for part in step.command if re.fullmatch(r"(tests|bench)/[\w/]+\.py", part)}
    examples = {"tests/ops/test_nms.py", "tests/ops/test_host_sync.py", "bench/bench_nms.py", "bench/bench_model.py"}
    assert examples <= named
    assert all((gpu_check.ROOT / path).is_file() for path in named)
    assert len({step.name for step in steps}) == len(steps)
    modules = [step.command[step.command.index("-m") + 1] for step in steps if "-m" in step.command]
    assert {"bench.calls", "tools.kernel_times", "tools.alternatives", "tools.tune_blocks"} <= set(modules)
    assert all(importlib.util.find_spec(module) for module in modules)
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_limits_add_up_to_less_than_the_time(tmp_path: Path) -> None:
    steps = gpu_check.steps(tmp_path)
    assert sum(step.limit for step in steps) < gpu_check.TOTAL
    names = [step.name for step in steps]
    assert names.index("small calls") < names.index("equality at full size") < names.index("operations")
    (memcheck,) = (step for step in steps if step.name == "memcheck")
    assert memcheck.limit >= 20


# Those of the project's packages that neither torch and torchvision bring nor the operations need.
OTHER_PACKAGES = ("tqdm", "matplotlib", "defusedxml", "safetensors", "pycocotools", "onnx", "onnxscript", "onnxruntime")


def test_operations_are_tested_without_the_other_packages(tmp_path: Path) -> None:
    (step,) = (step for step in gpu_check.steps(tmp_path) if step.name == "operations")
    files = [part for part in step.command if part.startswith("tests/")]
    assert "tests/ops/test_nms.py" in files
    source = f"""
import sys, pytest
sys.modules.update(dict.fromkeys({OTHER_PACKAGES}))
settings = ["-p", "no:benchmark", "-o", "addopts=--strict-markers --import-mode=importlib"]
sys.exit(pytest.main(["--collect-only", "-q", "-m", "kernel or cuda", *settings, *{files}]))
"""
    process = subprocess.run([sys.executable, "-c", source], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:]
