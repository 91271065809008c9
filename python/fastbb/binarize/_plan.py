# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model become binary, decided before anything is changed."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastbb.accelerate._changes import ABSENT, Change
from fastbb.binarize._report import BinarizeReport
from fastbb.nn.binary_attention import add_attention_state
from fastbb.nn.binary_linear import BinaryLinear, PackedModule
from fastbb.nn.binary_pack import BinaryEmbedding
from fastbb.nn.binary_presets import Preset

HF_SOURCES = {
    "transformers.models.bert.modeling_bert": "Bert",
    "transformers.models.camembert.modeling_camembert": "Camembert",
    "transformers.models.data2vec.modeling_data2vec_text": "Data2VecText",
    "transformers.models.electra.modeling_electra": "Electra",
    "transformers.models.ernie.modeling_ernie": "Ernie",
    "transformers.models.roberta.modeling_roberta": "Roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta": "XLMRoberta",
}
"""Module of Hugging Face -> prefix of its classes, whose layers have BERT's code."""
TIMM_SOURCE = "timm.models.vision_transformer"

SUPPORTED = (
    *(f"{source}.{prefix}Layer" for source, prefix in HF_SOURCES.items()),
    f"{TIMM_SOURCE}.Block",
)
"""Names of the layers that `binarize_` makes binary."""


class Plan:
    """Changes to a model, and the report on them."""

    def __init__(
        self, model: nn.Module, preset: Preset, patterns: Sequence[str], rank: int | None
    ) -> None:
        self.preset = preset
        self.rank = rank
        self.changes: list[Change] = []
        self.report = BinarizeReport(type(model).__qualname__)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self._patterns = patterns
        self._made: dict[int, nn.Module] = {}
        self._seen: set[int] = set()

    def skips(self, module: nn.Module) -> bool:
        """Whether a pattern leaves this module alone; then the report says so."""
        path = self.paths[id(module)]
        pattern = matching(self._patterns, path)
        if pattern is not None:
            self.skip(module, f"pattern {pattern!r}")
        return pattern is not None

    def skip(self, module: nn.Module, reason: str) -> None:
        if id(module) not in self._seen:
            self._seen.add(id(module))
            row = (self.paths[id(module)], type(module).__qualname__, reason)
            self.report.skipped.append(row)

    def note(self, module: nn.Module, what: str) -> None:
        self._seen.add(id(module))
        self.report.converted.append((self.paths[id(module)], type(module).__qualname__, what))

    def seen(self, module: nn.Module) -> bool:
        return id(module) in self._seen

    def replace(self, parent: nn.Module, name: str, settings: Any) -> bool:
        """`parent.name`, a Linear or Embedding, becomes binary. False: it is left alone."""
        child = getattr(parent, name)
        if id(child) in self._made:
            self.changes.append(Change(parent, name, child, self._made[id(child)]))
            return True
        if self.seen(child) or self.skips(child):
            return False
        reason = _foreign(child)
        if reason:
            self.skip(child, reason)
            return False
        new: nn.Module
        if isinstance(child, nn.Embedding):
            new = BinaryEmbedding.from_float(child, **settings)
        else:
            new = BinaryLinear.from_float(child, **settings)
        self._made[id(child)] = new
        self.changes.append(Change(parent, name, child, new))
        kind = f", inputs {new.kind}" if isinstance(new, BinaryLinear) else ""
        self.note(child, f"{type(new).__name__}{kind}")
        return True

    def swap(self, module: nn.Module, fast: type[nn.Module], what: str = "") -> None:
        """`module` gets the subclass `fast` of its class, and the preset."""
        self.changes += [
            Change(module, "preset", module.__dict__.get("preset", ABSENT), self.preset),
            Change(module, "__class__", type(module), fast),
        ]
        if what:
            self.note(module, what)

    def add_attention(self, module: nn.Module, dim: int, weight: Any) -> str:
        """Binary attention's own state; returns a description."""
        factory = {"device": weight.device, "dtype": weight.dtype}
        state = add_attention_state(module, dim, self.preset, self.rank, **factory)
        self.changes += [Change(module, name, ABSENT, value) for name, value in state.items()]
        rank = state["q_p"].out_features if "q_p" in state else 0
        return f"binary attention, {self.preset.probs}, estimators of rank {rank}"

    def activation(self, parent: nn.Module, name: str) -> None:
        """`parent.name`, an activation, becomes the preset's."""
        kinds: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
        old = getattr(parent, name)
        if self.preset.activation == "gelu" and _is_erf_gelu(old):
            return
        if type(old) is not kinds[self.preset.activation]:
            self.changes.append(Change(parent, name, old, kinds[self.preset.activation]()))
            if isinstance(old, nn.Module) and id(old) in self.paths:
                self.note(old, kinds[self.preset.activation].__name__)


def _is_erf_gelu(module: object) -> bool:
    if type(module) is nn.GELU:
        return module.approximate == "none"
    # Hugging Face's "gelu", which is torch's.
    return type(module).__name__ == "GELUActivation" and (
        getattr(module, "act", None) is nn.functional.gelu
    )


def _foreign(module: nn.Module) -> str:
    """Why a module is not the plain layer that can be replaced, or nothing."""
    if isinstance(module, (BinaryLinear, BinaryEmbedding, PackedModule)):
        return "binary already"
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"its class is {type(module).__qualname__}, not Linear or Embedding"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"it renormalises its rows to {module.max_norm}"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "it has hooks, which would be lost"
    return ""


def matching(patterns: Sequence[str], path: str) -> str | None:
    """The first pattern that matches a path or one above it."""
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((p for p in patterns if fnmatch.filter(above, p)), None)


def plan_binarize(
    model: nn.Module, preset: Preset, patterns: Sequence[str], rank: int | None
) -> tuple[list[Change], BinarizeReport]:
    """Changes that make `model` binary."""
    plan = Plan(model, preset, patterns, rank)
    for pattern in patterns:
        if not any(matching((pattern,), path) for path in plan.paths.values()):
            raise ValueError(
                f"binarize_: skip must match modules of {plan.report.model}, got {pattern!r}"
            )
    sources = {type(module).__module__ for module in model.modules()}
    rules: dict[type, Any] = {}
    for source in HF_SOURCES:
        if source in sources:
            rules |= importlib.import_module("fastbb.binarize.hf_bert").rules(source)
    if TIMM_SOURCE in sources:
        rules |= importlib.import_module("fastbb.binarize.timm_vit").RULES
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    for module in model.modules():
        if type(module) in rules:
            rules[type(module)](plan, module)
    for module in model.modules():
        plain = isinstance(module, (nn.Linear, nn.Embedding))
        if plain and not plan.seen(module) and not plan.skips(module):
            reason = _foreign(module) or _outside(plan, parents.get(id(module)), rules)
            plan.skip(module, reason)
    return plan.changes, plan.report


def _outside(plan: Plan, parent: nn.Module | None, rules: dict[type, Any]) -> str:
    if parent is None:
        return "it is the model itself"
    if any(plan.paths[id(parent)] == path for path, _, _ in plan.report.skipped):
        return f"in {type(parent).__qualname__}, which is skipped"
    if type(parent) in rules:
        return "presets keep it in full precision"
    return f"no rule makes {type(parent).__qualname__} binary"
