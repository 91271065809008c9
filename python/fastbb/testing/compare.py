# SPDX-License-Identifier: Apache-2.0
"""Comparison of a computed tensor with an exact one.

Element bounds alone miss errors that are small everywhere but have a direction (truncation
instead of rounding, a forgotten small term), and vector facts alone miss one wrong element. Both
are judged, and a failure names the first wrong coordinate. What passes is returned as a share: the
largest of these errors, each in units of its own bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Allowed differences.

    Attributes:
        rtol, atol: per element, |actual - expected| <= atol * unit + rtol * |expected|; unit is 1,
            for gradients the largest |expected|.
        relative_l2: |actual - expected| <= relative_l2 * |expected| as vectors. The bounds on
            the cosine (1 - relative_l2**2) and on bias follow from it: errors of rounding have
            random signs, so the mean error and the error along `expected` may only be a tenth of
            relative_l2, plus what chance leaves of n random signs.
    """

    rtol: float
    atol: float
    relative_l2: float

    def plus(self, other: Bounds, factor: float) -> Bounds:
        """These bounds and `factor` times the `other`."""
        return Bounds(*(a + factor * b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Bounds:
        """`factor` times these bounds."""
        return Bounds(*(factor * a for a in self))


class Tolerance(NamedTuple):
    """Bounds of one operator and dtype.

    Attributes:
        forward, grad: of a case that does not amplify errors.
        amplified_forward, amplified_grad: of the float32 arithmetic inside, what a case adds per
            unit of `Sample.difficulty` above 1. The rounding of 16-bit results is not amplified.
    """

    forward: Bounds
    grad: Bounds
    amplified_forward: Bounds
    amplified_grad: Bounds

    def forward_for(self, difficulty: float) -> Bounds:
        """Bounds of the result of a sample of this difficulty."""
        return self.forward.plus(self.amplified_forward, difficulty - 1)

    def grad_for(self, difficulty: float) -> Bounds:
        """Bounds of the gradients of a sample of this difficulty."""
        return self.grad.plus(self.amplified_grad, difficulty - 1)


class OutOfBounds(AssertionError):
    """A result that is not the expected one.

    Attributes:
        share: its largest error in units of the bound, above 1; infinite where shapes or the places
            of NaN and infinity differ.
    """

    def __init__(self, message: str, share: float) -> None:
        super().__init__(message)
        self.share = share


# Standard deviations of a mean of random signs that count as chance.
_CHANCE = 5.0
_SYSTEMATIC_SHARE = 0.1
# L2 normalisation divides by 1e-12 at a zero row: gradients of such rows are judged apart.
_HUGE = 1e6
# Gradients that cancel exactly in theory are judged by this share of the largest of their call.
_FLOOR = 0.05


def assert_close(actual: Tensor, expected: Tensor, bounds: Bounds, name: str = "result") -> float:
    """Raises OutOfBounds unless `actual` equals `expected` within `bounds`; returns the share.

    `expected` is the exact value, normally float64; where it lies outside the range of `actual`'s
    dtype, infinity is right. NaN must meet NaN, and an infinity the same infinity.
    """
    return _compare(actual, expected, bounds, name, unit=1.0, floor=0.0)


def assert_grad_close(
    actual: Tensor, expected: Tensor, bounds: Bounds, name: str = "gradient", floor: float = 0.0
) -> float:
    """As `assert_close`, with `atol` in units of the largest |expected|.

    `floor` is a natural size of the gradient: it replaces the largest and the root mean square of
    `expected` where these are smaller, for gradients that vanish by cancellation.
    """
    finite = expected[torch.isfinite(expected)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return _compare(actual, expected, bounds, name, unit=max(largest, floor), floor=floor)


def assert_grads_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bounds: Bounds
) -> float:
    """`assert_grad_close` for all gradients of one call, by the names of their inputs.

    Gradients of rows that L2 normalisation finds to be zero, which are of order 1e12, and all
    others are compared apart. What cancels exactly in theory is judged by the size of the rest.
    """
    if actual.keys() != expected.keys():
        raise OutOfBounds(f"gradients of {list(actual)}, not {list(expected)}", math.inf)
    usual = (g[g.abs() < _HUGE] for g in expected.values())
    floor = _FLOOR * max((g.abs().max().item() for g in usual if g.numel()), default=0.0)
    shares = [0.0]
    for key, exact in expected.items():
        grad = actual[key].detach().cpu()
        huge = (exact.abs() > _HUGE).any(-1, keepdim=True).expand_as(exact)
        if grad.shape == exact.shape:
            rows = _forgive_overflow(grad[huge], exact[huge], bounds)
            shares.append(assert_grad_close(rows, exact[huge], bounds, f"d{key} of zero rows"))
            grad, exact = grad.masked_fill(huge, 0), exact.masked_fill(huge, 0)
        shares.append(assert_grad_close(grad, exact, bounds, f"d{key}", floor=floor))
    return max(shares)


def _forgive_overflow(actual: Tensor, expected: Tensor, bounds: Bounds) -> Tensor:
    """`actual`, replaced where the bounds allow values on both sides of its dtype's largest."""
    if not expected.numel():
        return actual
    size = expected.abs()
    margin = bounds.atol * size.max() + bounds.rtol * size
    undecided = (size - torch.finfo(actual.dtype).max).abs() < margin
    return torch.where(undecided, expected.to(actual.dtype), actual)


def _compare(
    actual: Tensor, expected: Tensor, bounds: Bounds, name: str, unit: float, floor: float
) -> float:
    if actual.shape != expected.shape:
        message = f"{name}: shape {list(actual.shape)}, not {list(expected.shape)}"
        raise OutOfBounds(message, math.inf)
    got = actual.detach().double().cpu()
    want = _saturate(expected.detach().double().cpu(), actual.dtype)
    _compare_nonfinite(got, want, name)
    finite = torch.isfinite(want)
    zero = torch.zeros((), dtype=torch.float64)
    got, want = torch.where(finite, got, zero), torch.where(finite, want, zero)
    elements = _compare_elements(got, want, bounds, name, unit)
    return max(elements, _compare_vectors(got[finite], want[finite], bounds, name, floor))


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point or dtype == torch.float64:
        return x
    # Half a unit in the last place above the largest number rounds to infinity.
    limit = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)
    return torch.where(x.abs() > limit, x.sign() * math.inf, x)


def _first(wrong: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(wrong)[0].tolist())


def _compare_nonfinite(got: Tensor, want: Tensor, name: str) -> None:
    same = torch.isfinite(got) & torch.isfinite(want)
    same |= torch.isnan(got) & torch.isnan(want)
    same |= torch.isinf(want) & (got == want)
    if not same.all():
        at = _first(~same)
        raise OutOfBounds(
            f"{name}{list(at)}: got {got[at].item()}, expected {want[at].item()}; "
            f"{int((~same).sum())} of {same.numel()} elements differ in being finite",
            math.inf,
        )


def _compare_elements(got: Tensor, want: Tensor, bounds: Bounds, name: str, unit: float) -> float:
    error = (got - want).abs()
    allowed = bounds.atol * unit + bounds.rtol * want.abs()
    wrong = error > allowed
    shares = torch.where(error == 0, 0.0, error / allowed)
    share = shares.max().item() if shares.numel() else 0.0
    if not wrong.any():
        return share
    at = _first(wrong)
    at_worst = torch.unravel_index((error - allowed).argmax(), error.shape)
    worst = tuple(int(x) for x in at_worst)
    raise OutOfBounds(
        f"{name}{list(at)}: got {got[at].item():.8g}, expected {want[at].item():.8g}, "
        f"difference {error[at].item():.3g} > {allowed[at].item():.3g} "
        f"(rtol {bounds.rtol:.3g}, atol {bounds.atol * unit:.3g}); "
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, worst {list(worst)}: "
        f"got {got[worst].item():.8g}, expected {want[worst].item():.8g}",
        share,
    )


def _compare_vectors(got: Tensor, want: Tensor, bounds: Bounds, name: str, floor: float) -> float:
    n = want.numel()
    if n == 0:
        return 0.0
    error = got - want
    if not error.any():
        return 0.0
    size = max(want.norm().item() / math.sqrt(n), floor)
    if size == 0.0:
        return 0.0
    # Elements of very different sizes carry fewer than n independent signs in a norm.
    signs = want.square().sum().item() ** 2 / max(want.pow(4).sum().item(), 1e-300)
    systematic = bounds.relative_l2 * (_SYSTEMATIC_SHARE + _CHANCE / math.sqrt(max(signs, 1.0)))
    facts = {
        "relative L2 error": (error.norm().item() / (size * math.sqrt(n)), bounds.relative_l2),
        "mean error": (abs(error.mean().item()) / size, systematic),
        "error along the expected": (abs((error @ want).item()) / (size**2 * n), systematic),
    }
    if want.norm().item() / math.sqrt(n) > floor:
        cosine = (got @ want).item() / max(got.norm().item() * want.norm().item(), 1e-300)
        facts["1 - cosine"] = (1 - cosine, max(bounds.relative_l2**2, 1e-14))
    bad = [
        f"{fact} {value:.3g} > {limit:.3g}"
        for fact, (value, limit) in facts.items()
        if not value <= limit
    ]
    share = max(_share(value, limit) for value, limit in facts.values())
    if bad:
        worst = int(error.abs().argmax())
        raise OutOfBounds(
            f"{name}: {', '.join(bad)} over {n} elements; largest difference "
            f"{error[worst].item():.3g} where {want[worst].item():.8g} was expected",
            share,
        )
    return share


def _share(value: float, limit: float) -> float:
    if value <= 0:
        return 0.0
    return value / limit if limit else math.inf
