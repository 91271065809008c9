# SPDX-License-Identifier: Apache-2.0
"""The text of PTX modules: their kernels apart, and changes that tests must notice."""

from __future__ import annotations

import re
from collections.abc import Iterator

REMOVED = re.compile(r"^\s*(bar\.sync|cp\.async\.(wait_group|commit_group)).*$", re.MULTILINE)
MMA = re.compile(r"(mma\.sync\S+ \{[^}]*\}, )\{([^,]*), ([^,]*), ([^}]*)\}")


def kernels_of(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first kernel, and the text of each by its mangled name."""
    header, *bodies = re.split(r"(?=^\.visible \.entry )", text, flags=re.MULTILINE)
    return header, {body.split("(", 1)[0].split()[-1]: body for body in bodies}


def kernel_of(text: str, name: str, *others: str) -> tuple[str, str]:
    """(header and `others`, the kernel): the kernels whose mangled names contain these texts."""
    header, bodies = kernels_of(text)

    def find(part: str) -> str:
        (body,) = (body for each, body in bodies.items() if part in each)
        return body

    return header + "".join(map(find, others)), find(name)


def mutants(kernel: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the kernel with it): each barrier, wait and commit is deleted, one at a
    time, then the first two operands of some products are swapped.
    """
    removals = list(REMOVED.finditer(kernel))
    assert {m[1].split(".")[0] for m in removals} == {"bar", "cp"}
    products = list(MMA.finditer(kernel))
    assert len(products) >= 16
    changes = [(m, "") for m in removals]
    changes += [(m, m.expand(r"\1{\3, \2, \4}")) for m in products[:: len(products) // 4]]
    for match, to in changes:
        line = kernel.count("\n", 0, match.start()) + 1
        changed = kernel[: match.start()] + to + kernel[match.end() :]
        yield f"line {line}: {match[0].strip()}", changed
