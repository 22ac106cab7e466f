"""The progress of a run: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Seconds between two lines.
_BETWEEN = 30.0


class Lines:
    """What is used of tqdm's bar, as lines on stderr: the first at once, the others half a minute apart.

    Args:
        total, initial: images of the run, and those that are done.
    """

    def __init__(self, total: int, initial: int) -> None:
        self.total, self.n, self._initial = total, initial, initial
        self._start = time.monotonic()
        self._last = self._start - _BETWEEN
        self._description = ""

    def set_description(self, text: str) -> None:
        self._description = text

    def update(self, count: int) -> None:
        self.n += count

    def set_postfix_str(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last < _BETWEEN:
            return
        self._last = now
        rate = (self.n - self._initial) / max(now - self._start, 1e-9)
        left = (self.total - self.n) / max(rate, 1e-9) / 60
        done = f"{self._description}: {self.n} of {self.total} images"
        self.write(f"{done}, {rate:.1f} images/s, {left:.1f} minutes left, {text}")

    def write(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def show_progress(total: int, initial: int, shown: bool) -> Iterator[Any]:
    """tqdm's bar of images, or `Lines` where stderr is no terminal."""
    from tqdm import tqdm

    if shown and not sys.stderr.isatty():
        yield Lines(total, initial)
        return
    with tqdm(total=total, initial=initial, unit=" images", disable=not shown) as bar:
        yield bar
