# SPDX-License-Identifier: Apache-2.0
"""What can go wrong while PTX is read or executed. Every error names the PTX line it is at."""

from __future__ import annotations


class PtxError(Exception):
    """Base of all errors of the interpreter.

    Attributes:
        location: the PTX line, its text, and the line of the source if the PTX tells.
    """

    location: str = ""

    def at(self, location: str) -> PtxError:
        """This error with a place; the first place given stays."""
        if not self.location:
            self.location = location
            self.args = (f"{self.args[0] if self.args else ''} [{location}]",)
        return self


class Unsupported(PtxError):
    """An instruction, modifier or directive that the interpreter does not know."""


class LaunchError(PtxError):
    """Arguments, grid or block that the kernel cannot be launched with."""


class OutOfBounds(PtxError):
    """An access outside every buffer, or outside the shared memory of the block."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of the access."""


class Uninitialised(PtxError):
    """A read of memory that nothing was written to."""


class ReadOnly(PtxError):
    """A write to an input or a constant, or a non-coherent load of what this launch has written."""


class Race(PtxError):
    """Two accesses to one byte, at least one a write, that no barrier orders."""


class PendingCopy(PtxError):
    """An access to the destination of an asynchronous copy that was not waited for."""


class Divergence(PtxError):
    """A collective instruction that not all of its lanes reached together."""


class Deadlock(PtxError):
    """Threads that wait at a barrier nobody else will reach, or a loop without end."""


class Trap(PtxError):
    """The kernel executed `trap`."""
