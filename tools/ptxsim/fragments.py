# SPDX-License-Identifier: Apache-2.0
"""Which element of a matrix each register of each lane holds, for `mma` of shape m16n8k*.

All these shapes follow one pattern. With n elements per 32-bit register, lane = 4 * g + t:

    A, register r, element e:  row g + 8 * (r % 2),   column n * t + e + 4 * n * (r // 2)
    B, register r, element e:  row n * t + e + 4 * n * r,   column g
    C, element i of 4:         row g + 8 * (i // 2),  column 2 * t + i % 2
"""

from __future__ import annotations

import numpy as np

WARP = 32
_G = np.arange(WARP)[:, None, None] // 4
_T = np.arange(WARP)[:, None, None] % 4


def a_fragment(registers: int, per_register: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of A [16, k], each [lane, register, element]."""
    r = np.arange(registers)[None, :, None]
    e = np.arange(per_register)[None, None, :]
    row = _G + 8 * (r % 2) + 0 * e
    return row, per_register * _T + e + 4 * per_register * (r // 2)


def b_fragment(registers: int, per_register: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of B [k, 8], each [lane, register, element]."""
    r = np.arange(registers)[None, :, None]
    e = np.arange(per_register)[None, None, :]
    return per_register * _T + e + 4 * per_register * r, _G + 0 * r + 0 * e


def c_fragment(per_register: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of C and D [16, 8], each [lane, register, element]."""
    i = np.arange(4).reshape(1, 4 // per_register, per_register)
    return _G + 8 * (i // 2), 2 * _T + i % 2


def gather_index(rows: np.ndarray, cols: np.ndarray, width: int) -> np.ndarray:
    """For every element of the matrix, row by row, its place among [lane, register, element]."""
    place = (rows * width + cols).reshape(-1)
    index = np.empty_like(place)
    index[place] = np.arange(len(place))
    return index
