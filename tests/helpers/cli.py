"""The command line in this process."""

import pytest

from fastdet.cli.main import main


def message(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line on stderr, beside warnings and bars, of a command that exits with `code`."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    output = capsys.readouterr().err
    lines = [line for line in output.split("\n") if "\r" not in line and line.strip() and "warning: " not in line]
    assert len(lines) == 1, output
    return lines[0]
