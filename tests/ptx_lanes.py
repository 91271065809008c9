# SPDX-License-Identifier: Apache-2.0
"""Helpers of the ptxsim tests: kernels around a few lines of PTX, one value per lane in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import ptxsim

HEADER = ".version 8.5\n.target sm_90\n.address_size 64\n"
_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, params: tuple[str, ...] = (), declarations: str = "") -> str:
    """A kernel `k` with pointer parameters, loaded into registers of their names."""
    listed = ", ".join(f".param .u64 {name}_param" for name in params)
    loads = "\n".join(f".reg .b64 {name};\nld.param.u64 {name}, [{name}_param];" for name in params)
    return (
        f"{HEADER}{declarations}\n.visible .entry k({listed})\n{{\n{loads}\n"
        f".reg .b32 tid;\nmov.u32 tid, %tid.x;\n{body}\nret;\n}}\n"
    )


def launch(body: str, *, block: int = 32, declarations: str = "", **options: Any) -> ptxsim.Result:
    """Runs a kernel without parameters."""
    text = kernel(body, declarations=declarations)
    return ptxsim.load(text).launch("k", grid=options.pop("grid", 1), block=block, **options)


def lanes(
    body: str,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, Any],
    *,
    declarations: str = "",
    **options: Any,
) -> dict[str, np.ndarray]:
    """Runs `body` with one lane per element of the inputs, which stand in registers of their names.

    Outputs are registers too, by name and numpy type; their values per lane are returned.
    """
    count = len(next(iter(inputs.values()))) if inputs else 32
    lines = [".reg .b64 at;"]
    buffers = {}
    for name, values in inputs.items():
        size = values.dtype.itemsize
        buffers[name] = ptxsim.Buffer(values, "in", name)
        lines += [
            f".reg .{_REGISTERS[size]} {name};",
            f"mad.wide.u32 at, tid, {size}, p_{name};",
            f"ld.global.b{8 * size} {name}, [at];",
        ]
    for name, dtype in outputs.items():
        size = np.dtype(dtype).itemsize
        buffers[name] = ptxsim.Buffer(np.zeros(count, dtype), "out", name)
        if name not in inputs:
            lines.append(f".reg .{_REGISTERS[size]} {name};")
    lines.append(body)
    for name, dtype in outputs.items():
        size = np.dtype(dtype).itemsize
        lines += [
            f"mad.wide.u32 at, tid, {size}, p_{name};",
            f"st.global.b{8 * size} [at], {name};",
        ]
    text = kernel("\n".join(lines), tuple(f"p_{name}" for name in buffers), declarations)
    result = ptxsim.load(text).launch(
        "k", grid=1, block=count, args=list(buffers.values()), **options
    )
    return {name: result[buffers[name]] for name in outputs}


def one(instruction: str, dtype: Any, **inputs: np.ndarray) -> np.ndarray:
    """The result `d` of one instruction whose operands are named inputs."""
    return lanes(f"{instruction};", inputs, {"d": dtype})["d"]


def integers(dtype: Any, count: int = 256, seed: int = 0) -> np.ndarray:
    """Random integers, mostly of all sizes, with the extremes among them."""
    random = np.random.default_rng(seed)
    bits = 8 * np.dtype(dtype).itemsize
    raw = random.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2)
    raw >>= random.integers(64 - bits, 64, count, dtype=np.uint64)
    raw[:4] = [0, 1, (1 << bits) - 1, 1 << (bits - 1)]
    return raw.astype(f"u{bits // 8}").view(dtype)


def floats(dtype: Any = np.float32, count: int = 256, seed: int = 0) -> np.ndarray:
    """Random floats over many magnitudes, with zeros, subnormals, infinities and NaN among them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count) * np.exp2(random.integers(-20, 20, count))
    values = values.astype(dtype)
    tiny = np.finfo(dtype).smallest_subnormal * np.array(3, dtype)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5], dtype)
    values[: len(special)] = random.permutation(special)
    values[len(special)] = tiny
    return values
