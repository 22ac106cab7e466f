"""`pytest` runs tests/, `pytest --benchmark-only` runs bench/; a path given by hand is taken as it is."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-csv", metavar="FILE", help="write the table of the benchmarks to FILE")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return None
    unwanted = "tests" if config.getoption("benchmark_only") else "bench"
    return True if collection_path == config.rootpath / unwanted else None
