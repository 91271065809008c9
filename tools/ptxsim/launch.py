# SPDX-License-Identifier: Apache-2.0
"""Loading PTX and launching kernels: arguments in, results and statistics out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptxsim import ops_compare, ops_convert, ops_float, ops_integer, ops_memory, ops_mma, ops_warp
from ptxsim.arena import Arena
from ptxsim.errors import LaunchError
from ptxsim.image import Image, build
from ptxsim.machine import Dim3, Machine
from ptxsim.program import Function, Unit, Variable
from ptxsim.shared import SHARED_START
from ptxsim.stats import Stats
from ptxsim.syntax import parse

# Importing these modules fills the table of instructions.
INSTRUCTIONS = (
    ops_compare,
    ops_convert,
    ops_float,
    ops_integer,
    ops_memory,
    ops_mma,
    ops_warp,
)
DEFAULT_MAX_STEPS = 20_000_000


class Buffer:
    """An argument that is a pointer to an array in global memory.

    Args:
        array: contents; of an `out` buffer only shape and dtype count.
        mode: "in", "out" or "inout", as in `Arena.add`.
    """

    def __init__(self, array: np.ndarray, mode: str = "in", name: str = "") -> None:
        self.array = array
        self.mode = mode
        self.name = name


Argument = Buffer | np.generic | bytes | ctypes.Structure


@dataclass
class Result:
    """What a launch leaves behind.

    Attributes:
        stats: counts of instructions, conflicts, sectors and barriers.
        arena: global memory after the launch.
        addresses: of the buffers among the arguments, by the buffer's identity.
    """

    stats: Stats
    arena: Arena
    addresses: dict[int, int]
    variables: dict[str, Variable]

    def __getitem__(self, buffer: Buffer) -> np.ndarray:
        """The contents of a buffer after the launch."""
        return self.arena.get(self.addresses[id(buffer)])

    def written(self, buffer: Buffer) -> np.ndarray:
        """Which elements of a buffer hold a value."""
        return self.arena.written(self.addresses[id(buffer)])

    def variable(self, name: str) -> np.ndarray:
        """The bytes of a module variable after the launch."""
        return self.arena.get(self.variables[name].address)


def _dim3(value: int | Sequence[int], what: str, limits: Dim3) -> Dim3:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    full = (*sizes, 1, 1)[:3]
    if len(sizes) > 3 or any(not 1 <= s <= top for s, top in zip(full, limits, strict=True)):
        raise LaunchError(f"{what} must be 1 to 3 numbers from 1 to {limits}, got {value}")
    return full[0], full[1], full[2]


class Module:
    """Parsed PTX. Use `load`."""

    def __init__(self, text: str) -> None:
        self.unit: Unit = parse(text)
        self._image: Image | None = None

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels."""
        return [f.name for f in self.unit.functions.values() if f.entry]

    def _build(self, name: str) -> Image:
        if name not in self.kernels:
            raise LaunchError(f"kernel must be one of {self.kernels}, got {name!r}")
        # Addresses of variables belong to one kernel at a time.
        if self._image is None or self._image.kernel.name != name:
            self._image = build(self.unit, self.unit.functions[name], SHARED_START)
        return self._image

    def launch(
        self,
        kernel: str,
        *,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Argument] = (),
        dynamic_shared: int = 0,
        arena: Arena | None = None,
        variables: dict[str, np.ndarray] | None = None,
        schedule: str = "lockstep",
        seed: int = 0,
        max_steps: int = DEFAULT_MAX_STEPS,
    ) -> Result:
        """Runs a kernel to its end.

        Args:
            kernel: its name in the PTX.
            grid, block: numbers of blocks and of threads, one to three.
            args: one per parameter: a Buffer, a numpy scalar (`np.int32(3)`), or a struct by value
                as bytes or ctypes.Structure, with addresses from `Arena.add` for its pointers.
            dynamic_shared: bytes of dynamic shared memory.
            arena: global memory with buffers that structs point to; a new one by default.
            variables: contents for module variables (`__constant__`, `__device__`), by name.
            schedule: "lockstep" runs all warps of a block together, "random" draws a warp anew for
                every few instructions.
            seed: of the random schedule.
            max_steps: a block that needs more is taken for endless.

        Raises:
            LaunchError: for wrong arguments.
            PtxError: a class of `ptxsim.errors` for whatever goes wrong in the kernel.
        """
        image = self._build(kernel)
        arena = Arena() if arena is None else arena
        grid3 = _dim3(grid, "grid", (2**31 - 1, 65535, 65535))
        block3 = _dim3(block, "block", (1024, 1024, 64))
        _check_block(image.kernel, block3)
        self._place_variables(arena, variables or {})
        params, addresses = _pack(image, args, arena)
        machine = Machine(
            image,
            arena,
            params,
            grid3,
            block3,
            dynamic_shared,
            self.unit.register_widths,
            schedule,
            seed,
            max_steps,
        )
        machine.run()
        return Result(machine.stats, arena, addresses, self.unit.variables)

    def _place_variables(self, arena: Arena, contents: dict[str, np.ndarray]) -> None:
        """Gives module variables an address; they are initialised anew for every launch."""
        places = [v for v in self.unit.variables.values() if v.space in ("global", "const")]
        unknown = set(contents) - {variable.name for variable in places}
        if unknown:
            raise LaunchError(f"no module variables {sorted(unknown)}")
        for variable in places:
            raw = np.zeros(variable.size, np.uint8)
            if variable.data is not None:
                raw[:] = np.frombuffer(variable.data, np.uint8)
            if variable.name in contents:
                given = np.ascontiguousarray(contents[variable.name]).reshape(-1).view(np.uint8)
                if len(given) != variable.size:
                    raise LaunchError(
                        f"{variable.name} has {variable.size} bytes, got {len(given)}"
                    )
                raw[:] = given
            mode = "in" if variable.space == "const" else "inout"
            variable.address = arena.add(raw, mode, name=variable.name)
        for variable in places:
            for offset, name, extra in variable.symbols:
                target = self.unit.variables[name].address + extra
                arena.patch(variable.address + offset, target.to_bytes(8, "little"))


def _check_block(kernel: Function, block: Dim3) -> None:
    threads = block[0] * block[1] * block[2]
    if threads > 1024:
        raise LaunchError(f"block must have at most 1024 threads, got {threads}")
    most = kernel.limits.get("maxntid")
    if most and threads > int(np.prod(most)):
        raise LaunchError(f"{kernel.name} allows blocks of {int(np.prod(most))}, got {threads}")
    exact = kernel.limits.get("reqntid")
    if exact and tuple((*exact, 1, 1)[:3]) != block:
        raise LaunchError(f"{kernel.name} needs blocks of {exact}, got {block}")


def _pack(image: Image, args: Sequence[Argument], arena: Arena) -> tuple[bytes, dict[int, int]]:
    """The bytes of the parameter space."""
    params = image.kernel.params
    if len(args) != len(params):
        raise LaunchError(f"{image.kernel.name} has {len(params)} parameters, got {len(args)}")
    space = bytearray(image.param_size)
    addresses: dict[int, int] = {}
    for i, (param, arg) in enumerate(zip(params, args, strict=True)):
        raw: Any
        if isinstance(arg, Buffer):
            if id(arg) not in addresses:
                name = arg.name or f"argument {i}"
                addresses[id(arg)] = arena.add(arg.array, arg.mode, name=name)
            raw = addresses[id(arg)].to_bytes(8, "little")
        elif isinstance(arg, np.generic):
            raw = arg.tobytes()
        elif isinstance(arg, (bytes, bytearray, ctypes.Structure)):
            raw = bytes(arg)
        else:
            raise LaunchError(f"argument {i} must be a Buffer, numpy scalar or bytes, got {arg!r}")
        if len(raw) != param.size:
            raise LaunchError(f"argument {i} must have {param.size} bytes, got {len(raw)}")
        space[param.address : param.address + param.size] = raw
    return bytes(space), addresses


def load(source: str | Path) -> Module:
    """Parses PTX text, or the file at a path.

    Raises PtxError for what does not parse.
    """
    if isinstance(source, Path) or "\n" not in source:
        return Module(Path(source).read_text("utf-8"))
    return Module(source)
