"""`pytest` runs tests/, `pytest --benchmark-only` runs bench/; paths on the command line override both."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdet's benchmarks")
    group.addoption("--bench-csv", metavar="FILE", help="write the table of the benchmarks (--bench-csv=FILE)")
    group.addoption("--busy", action="store_true", help="run benchmarks beside a process that keeps one core busy")
    group.addoption("--threads", type=int, metavar="N", help="let benchmarks take N threads of the CPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_only", False) and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = ["bench"]
