# SPDX-License-Identifier: Apache-2.0
"""What the commands share on the terminal: errors of use, progress lines, text tables."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TextIO


class UsageError(Exception):
    """A request that the command cannot serve; its text goes to the user, without a traceback."""


class WrongResult(RuntimeError):
    """What a command computed is wrong; its text says what."""


def require(module: str, purpose: str, extra: str = "demo") -> ModuleType:
    """Imports an optional dependency, or raises UsageError with the command that installs it, as
    part of one of fastbb's extras."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs {module.split('.')[0]}, which cannot be imported ({error}); "
            f"install it with: pip install 'fastbb[{extra}]'"
        ) from error


class Progress:
    """Lines that start with the seconds since the command began.

    `update` may be called often: on a terminal it rewrites one line, elsewhere it prints at most
    one line in `interval` seconds.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._start = self._last = time.perf_counter()
        self._open_line = False

    def step(self, text: str) -> None:
        """Announces a step."""
        self._close_line()
        self._write(f"{self._stamp()} {text}\n")

    def update(self, text: str) -> None:
        """Tells how far the current step is."""
        now = time.perf_counter()
        if self._stream.isatty():
            self._write(f"\r\033[K{self._stamp()}   {text}")
            self._open_line = True
        elif now - self._last >= 0.9 * self._interval:
            self._write(f"{self._stamp()}   {text}\n")

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows within the block that a step without news of its own is still running."""
        start = time.perf_counter()
        finished = threading.Event()

        def tell() -> None:
            while not finished.wait(self._interval):
                self.update(f"{text}: {time.perf_counter() - start:.0f} s so far")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            finished.set()
            teller.join()

    def close(self) -> None:
        """Ends a line left open by `update`."""
        self._close_line()

    def _stamp(self) -> str:
        return f"[{time.perf_counter() - self._start:6.1f} s]"

    def _close_line(self) -> None:
        if self._open_line:
            self._write("\r\033[K")
            self._open_line = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
        self._last = time.perf_counter()


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join((line(header), "  ".join("-" * w for w in widths), *map(line, rows)))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a Markdown table."""
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))
