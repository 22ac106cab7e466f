"""The command line: `fastdet train`, `eval`, `detect`, `export`, `lint`, `convert`, and the others of `--help`."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fastdet.cli.commands import COMMANDS
from fastdet.cli.doctor import SelfCheckError
from fastdet.cli.lint import DataSetError
from fastdet.cli.options import parse
from fastdet.cli.values import UserError
from fastdet.data import DataError
from fastdet.engine import Terminated
from fastdet.engine.distributed import OtherFailedError
from fastdet.safe_files import FileError, printable

# The last two are what shells give for SIGINT and SIGTERM.
_FAILED, _USER_ERROR, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error that the user can correct is one line on stderr.

    Returns:
        0; 1 if training diverged, memory ran out, another process of the run failed, the self-check of `doctor` failed
        or `lint` found errors; 2 for an error in options or files, or a package that is missing; 130 after Ctrl-C; 143
        after SIGTERM, in training with its state saved.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            for stream in (sys.stdout, sys.stderr):
                # What the encoding of a terminal lacks is escaped.
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="backslashreplace")
            options = parse(sys.argv[1:] if argv is None else argv)
            COMMANDS[options.command](options)
        return 0
    except KeyboardInterrupt as interrupt:
        message, code = ": ".join(filter(None, ["interrupted", str(interrupt)])), _INTERRUPTED
    except Terminated as error:
        message, code = f"terminated; {error}: go on with --resume", _TERMINATED
    except OtherFailedError:
        return _FAILED
    except ConnectionError as error:
        message, code = str(error), _FAILED
    except (UserError, DataError, FileError, ImportError, OSError) as error:
        message, code = _last_line(error), _USER_ERROR
    except FloatingPointError as error:
        message, code = (
            f"{error}; a lower --lr or a longer --warmup-steps may help, and fastdet replay takes the step again",
            _FAILED,
        )
    except (SelfCheckError, DataSetError) as error:
        message, code = str(error), _FAILED
    except torch.OutOfMemoryError:
        message, code = "the device's memory is too small; try a lower --batch-size or --max-size", _FAILED
    print(f"fastdet: {printable(message)}", file=sys.stderr)
    return code


def _last_line(error: Exception) -> str:
    """The message of an error; of one from a loader's worker, which comes with a traceback, its last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"fastdet: warning: {printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
