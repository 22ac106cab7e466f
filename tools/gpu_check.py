"""Everything that needs a GPU, in one command of at most nine minutes: `make gpu-check OUT=DIR`.

    python -m tools.gpu_check --out DIR

The steps run one after another, each in a process with a limit of its own; one that fails or is late stops none of the
others. DIR then holds summary.txt (a line a step), logs.txt (the output of each step), bench.csv, kernel_times.csv,
alternatives.csv and sweep.csv. The status is 0 where every step passed, 1 where one did not, 2 where there is no GPU.
Needs torch, triton and pytest, and no network.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# Seconds for all steps together; what the last of them may take to be stopped comes on top.
TOTAL = 520.0
# Seconds that an interrupted step has to write what it found.
GRACE = 8.0
# Seconds that a step which keeps its own time needs besides.
START_AND_END = 15.0
# Characters of a step's log that are kept, half of them from its beginning.
LONGEST_LOG = 1_000_000

PASSED, FAILED, LATE, ABSENT = "passed", "FAILED", "LATE", "left out"


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds; "{seconds}" in it becomes what it has for its work.

    `absent` is the reason why it cannot run here; `adds` names a CSV that it writes and the one to which that is added.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str | None = None
    adds: tuple[Path, Path] | None = None


class Result(NamedTuple):
    """How a step ended, after how many seconds, and the lines of its output that name what failed, or the last one."""

    step: str
    outcome: str
    seconds: float
    lines: list[str]


def run(step: Step, log: Path, seconds: float) -> Result:
    """Run a step with its output in `log`. When its time is up it is interrupted, then killed with all its children."""
    command = [part.replace("{seconds}", str(max(int(seconds - START_AND_END), 1))) for part in step.command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    start = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Result(step.name, FAILED, 0.0, [str(error)])
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            # As Ctrl-C does: pytest then writes its tables of what it has so far.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcome = LATE if late else FAILED if process.returncode else PASSED
    return Result(step.name, outcome, time.monotonic() - start, summary_lines(log.read_text(errors="replace"), outcome))


def summary_lines(log: str, outcome: str) -> list[str]:
    """The lines that name what failed, if any, and the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    failure = re.compile(
        r"(\[gw\d+\] .{6} )?(FAILED|ERROR) \S+|failed: |cannot be swept: |=+ (Invalid|Error|Warning: Race|Error: Race)"
    )
    failed = [line for line in lines if failure.match(line)] if outcome != PASSED else []
    more = [f"and {len(failed) - 12} more"] if len(failed) > 12 else []
    return [*failed[:12], *more, *lines[-1:]]


def run_all(steps: Sequence[Step], out: Path, total: float = TOTAL) -> list[Result]:
    """Run the steps in turn within `total` seconds; summary.txt and logs.txt in `out` are up to date after each."""
    end = time.monotonic() + total
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder, (out / "logs.txt").open("w") as logs:
        for step in steps:
            left = end - time.monotonic()
            log = Path(folder) / "log"
            log.touch()
            print(f"{step.name} ...", flush=True)
            if step.absent:
                result = Result(step.name, ABSENT, 0.0, [step.absent])
            elif left < 1:
                result = Result(step.name, ABSENT, 0.0, ["no time was left"])
            else:
                result = run(step, log, min(step.limit, left))
            results.append(result)
            logs.write(f"==== {step.name}: {result.outcome}\n{' '.join(step.command)}\n{shorten(log)}\n")
            logs.flush()
            if step.adds:
                add_rows(*step.adds)
            (out / "summary.txt").write_text(table(results))
            print("\n".join(f"  {line}" for line in table([result]).splitlines()[1:]), flush=True)
    return results


def shorten(log: Path) -> str:
    """The text of a log, with its middle left out where it is longer than `LONGEST_LOG`."""
    text, half = log.read_text(errors="replace"), LONGEST_LOG // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n[... {len(text) - 2 * half} ...]\n{text[-half:]}"


def table(results: Sequence[Result]) -> str:
    lines = [f"{'step':<26} {'result':<9} {'seconds':>7}  what"]
    for result in results:
        first, *others = [line[:200] for line in result.lines] or [""]
        lines.append(f"{result.step:<26} {result.outcome:<9} {result.seconds:>7.1f}  {first}")
        lines += [f"{'':<26} {'':<9} {'':>7}  {line}" for line in others]
    return "\n".join(lines) + "\n"


def add_rows(part: Path, whole: Path) -> None:
    """Append the rows of a CSV to another of the same columns, and remove it; it need not exist."""
    if not part.exists():
        return
    header, *rows = part.read_text().splitlines(keepends=True)
    previous = whole.read_text() if whole.exists() else header
    whole.write_text(previous + "".join(rows))
    part.unlink()


def steps(out: Path) -> list[Step]:
    """All steps, what decides most first. Their limits add up to less than `TOTAL`."""
    python = [sys.executable]
    has_benchmark = importlib.util.find_spec("pytest_benchmark") is not None
    # Without its plugin pytest rejects the options of the project's settings.
    pytest = [
        *python,
        "-m",
        "pytest",
        "--tb=short",
        *([] if has_benchmark else ["-o", "addopts=--strict-markers --import-mode=importlib -rfE"]),
    ]
    alone = ["tests/ops/test_repeatable.py", "tests/ops/test_host_sync.py", "tests/ops/test_full_size.py"]
    marked = [
        path
        for path in sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
        if path not in alone and re.search(r"mark\.(kernel|cuda)\b", (ROOT / path).read_text())
    ]
    # Each test by name as it ends: interrupted, the processes of xdist give no summary.
    side_by_side = ["-v", "-n", str(min(14, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    benches = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "bench").rglob("bench_*.py"))
    whole = {f"bench/bench_{name}.py" for name in ("model", "accelerate", "onnx", "loading")}

    def benchmark(name: str, chosen: list[str], limit: float) -> Step:
        part = out / "part.csv"
        command = [*pytest, *(["--benchmark-only"] if has_benchmark else []), f"--bench-csv={part}", *chosen]
        return Step(name, command, limit, adds=(part, out / "bench.csv"))

    def cooperative(limit: float) -> Step:
        part = out / "part.csv"
        command = [*python, "-m", "tools.alternatives", "--cooperative", "--csv", str(part)]
        return Step("one cooperative launch", command, limit, adds=(part, out / "alternatives.csv"))

    def program(name: str, module: str, limit: float, *options: str) -> Step:
        return Step(name, [*python, "-m", module, *options], limit)

    install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    one_image = "(train-1-bfloat16 or infer-1-bfloat16) and not fused"
    return [
        Step("install in place", [*python, *install, "-e", "."], 10),
        program("environment", "tools.gpu_check", 10, "--environment"),
        # Compiles the kernels, so that the time limit of the sanitizer does not include that.
        program("small calls", "bench.calls", 30),
        Step("equality at full size", [*pytest, "-m", "cuda", alone[2]], 35),
        program("kernel times", "tools.kernel_times", 25, "--csv", str(out / "kernel_times.csv")),
        benchmark("benchmarks: model", ["bench/bench_model.py", "-k", one_image], 95),
        program("topk against sort", "tools.alternatives", 15, "--csv", str(out / "alternatives.csv")),
        Step(
            "operations",
            [*pytest, "-m", "kernel or cuda", "-k", "not cooperative", *side_by_side, *marked],
            90,
            # Else each of the workers takes as many threads as there are cores.
            environment={"OMP_NUM_THREADS": "2"},
        ),
        Step("same bits 50 times", [*pytest, alone[0]], 20),
        Step("no host sync, one graph", [*pytest, alone[1]], 35),
        benchmark("benchmarks: operations", [path for path in benches if path not in whole], 70),
        program(
            "sweep",
            "tools.tune_blocks",
            35,
            *("--csv", str(out / "sweep.csv"), "--seconds", "{seconds}", "--only", "nms", "roi_pool", "roi_align"),
        ),
        sanitizer("memcheck", 25),
        # It was never run on a GPU: where its programs wait for each other without end, nothing else is lost.
        cooperative(20),
    ]


def sanitizer(tool: str, limit: float) -> Step:
    """compute-sanitizer over a small call of each operation, watching the kernels of fastdet alone."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    usage = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout if program else ""
    only = next((option for option in ("--kernel-name", "--kernel-regex") if option in usage), None)
    source = "".join(path.read_text() for path in sorted((ROOT / "kernels").rglob("*.py")))
    names = sorted(set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)))
    command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    if only:
        command += [part for name in names for part in (only, f"kns={name}")]
    return Step(
        tool,
        [*command, sys.executable, "-m", "bench.calls"],
        limit,
        # Without torch's cache each tensor ends where its allocation ends, so that an access beyond it is detected.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        absent=None if program else "there is no compute-sanitizer",
    )


def environment() -> None:
    """Print the device, its clocks, the driver and the versions of what runs on them."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    print(f"device: {properties.name}, {properties.multi_processor_count} multiprocessors")
    print(f"memory: {properties.total_memory / 2**30:.1f} GiB")
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, CUDA {torch.version.cuda}")
    for package in ("torch", "torchvision", "triton", "numpy", "pytest", "pytest_benchmark", "xdist"):
        try:
            print(package, importlib.metadata.version({"xdist": "pytest-xdist"}.get(package, package)))
        except importlib.metadata.PackageNotFoundError:
            print(package, "not installed")
    # Triton builds the launcher of each kernel with it, at the first call.
    print("C compiler:", shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or "none")
    query = "driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    with contextlib.suppress(OSError):
        subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], check=False)
    print(f"{properties.name}, torch {torch.__version__}")


def slug(device: str) -> str:
    """A file's name for a device: lower case, words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run everything that needs a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all steps together ({TOTAL:g})")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="those steps alone, by the beginnings of their names")
    parser.add_argument("--environment", action="store_true", help="only print the device and the versions")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that torch can use; there is none", file=sys.stderr)
        return 2
    if options.environment:
        environment()
        return 0
    # A parent that ignores interrupts would hand that on to the steps, which could not be interrupted then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("bench.csv", "kernel_times.csv", "alternatives.csv", "sweep.csv", "part.csv"):
        (out / name).unlink(missing_ok=True)
    chosen = [step for step in steps(out) if not options.only or step.name.startswith(tuple(options.only))]
    results = run_all(chosen, out, options.seconds)
    print(f"\n{table(results)}\nTo keep: cp {out}/bench.csv bench/results/{slug(torch.cuda.get_device_name())}.csv")
    return 0 if all(result.outcome in (PASSED, ABSENT) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
