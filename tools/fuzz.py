"""Call the operations, the detector and the readers of files with hostile arguments for some minutes.

    python -m tools.fuzz [--minutes 60] [--examples 500]

Each round is a process of its own, with other draws: one that ends by a signal, or does not end, is reported too.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

TESTS = "tests/hostile/test_fuzz.py"
# Seconds that a round of 500 examples may take, twenty times what it mostly does.
LIMIT = 2400
LOG = Path("fuzz.log")


def run_round(examples: int) -> tuple[str, str]:
    """How a round ended, in a word, and its output."""
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    environment = {**os.environ, "FUZZ_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        return "hung", str(error.stdout)
    word = {0: "passed", 1: "failed"}.get(done.returncode, "crashed")
    return word, done.stdout + done.stderr


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="the last round starts before they are over")
    parser.add_argument("--examples", type=int, default=500, help="draws of each property in a round")
    options = parser.parse_args(arguments)
    end, rounds, calls = time.monotonic() + 60 * options.minutes, Counter[str](), 0
    while time.monotonic() < end:
        word, output = run_round(options.examples)
        rounds[word] += 1
        properties = re.search(r"(\d+) passed", output)
        calls += options.examples * int(properties[1]) if properties else 0
        print(f"{calls} calls right or refused by name; rounds: {dict(rounds)}", flush=True)
        if word != "passed":
            with LOG.open("a") as log:
                log.write(output)
            print(f"see {LOG}", flush=True)
    return int(set(rounds) != {"passed"})


if __name__ == "__main__":
    sys.exit(main())
