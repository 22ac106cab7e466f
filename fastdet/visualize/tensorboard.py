"""The figures of a run for TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def require_tensorboard() -> None:
    """Raises ImportError, with the command that installs it, where TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("event files need TensorBoard: pip install tensorboard")


@contextlib.contextmanager
def write_events(folder: str | Path, first_step: int = 1) -> Iterator[Callable[[str, Mapping[str, float]], None]]:
    """An event file in a run's folder, for `tensorboard --logdir`.

    What is given, `add(group, row)`, writes each value of a row, except its "epoch", as the scalar "group/name" of its
    "step". A row is in the file when the call returns, so that a killed process loses none.

    Args:
        folder: of the run; made if it is not there.
        first_step: of the rows to come. A run that is resumed repeats the steps after its checkpoint: TensorBoard hides
            what the folder's other event files have from this step on. With 1 those files are removed.

    Raises:
        ImportError: TensorBoard is missing.
        OSError: the folder cannot be written.
    """
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    if first_step <= 1:
        for path in Path(folder).glob("events.out.tfevents.*"):
            path.unlink()
    with SummaryWriter(str(folder), purge_step=first_step) as writer:

        def add(group: str, row: Mapping[str, float]) -> None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    writer.add_scalar(f"{group}/{name}", value, int(row["step"]))
            writer.flush()

        yield add
