"""`pytest` runs tests/, `pytest --benchmark-only` runs bench/; paths on the command line override both."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-csv", metavar="FILE", help="write the table of the benchmarks (--bench-csv=FILE)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_only", False) and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = ["bench"]
