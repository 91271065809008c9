# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's BERT and the models whose layers have the same code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastbb.accelerate._changes import ABSENT, Change
from fastbb.binarize._masks import additive_mask
from fastbb.binarize._plan import HF_SOURCES, Plan
from fastbb.nn.binary_attention import attend
from fastbb.nn.binary_bert import pool
from fastbb.nn.binary_linear import PackedBinaryLinear, feed_forward

# Of decoders, and of earlier versions of the library.
_REFUSED = (
    "cache",
    "encoder_hidden_states",
    "head_mask",
    "output_attentions",
    "past_key_value",
    "past_key_values",
)


class SelfAttention:
    """Binary products of queries, keys, values and probabilities."""

    calibrating = False

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *others: Any,
        **named: Any,
    ) -> tuple[Tensor, None]:
        op = type(self).__name__
        given = [
            name for name in _REFUSED if named.get(name) is not None and named[name] is not False
        ]
        given += ["a third argument"] if any(x is not None for x in others) else []
        if given:
            raise NotImplementedError(
                f"{op}: caches, encoder states, head masks and output_attentions must be left "
                f"out of binary attention, got {', '.join(given)}"
            )
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()
        mask = additive_mask(op, attention_mask, hidden_states.shape[0])
        shape = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            layer(hidden_states).unflatten(-1, shape)
            for layer in (self.query, self.key, self.value)
        )
        return attend(self, hidden_states, q, k, v, mask, self.dropout.p), None


class Layer:
    """A feed-forward network that goes from bits to bits once it is packed."""

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        up, down = self.intermediate.dense, self.output.dense
        if isinstance(up, PackedBinaryLinear) and isinstance(down, PackedBinaryLinear):
            hidden = feed_forward(attention_output, up, down, self.preset.activation)
            return self.output.LayerNorm(self.output.dropout(hidden) + attention_output)
        return super().feed_forward_chunk(attention_output)  # type: ignore[misc]


class Pooler:
    """tanh(LayerNorm(dense(x)) + x) of the first token's x (BiPFT)."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return pool(self, hidden_states[:, 0])


_PARTS: dict[str, type] = {"SelfAttention": SelfAttention, "Layer": Layer, "Pooler": Pooler}


def _source_class(prefix: str, part: str) -> type[nn.Module] | None:
    source = next(name for name, value in HF_SOURCES.items() if value == prefix)
    __import__(source)
    return getattr(sys.modules[source], f"{prefix}{part}", None)


def __getattr__(name: str) -> type[nn.Module]:
    """`Binarized<Prefix><Part>`, made when asked for, so that pickled models find their classes."""
    for prefix in HF_SOURCES.values():
        for part, mixin in _PARTS.items():
            if name == f"Binarized{prefix}{part}":
                base = _source_class(prefix, part)
                if base is not None:
                    made = type(name, (mixin, base), {"__module__": __name__})
                    globals()[name] = made
                    return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rules(source: str) -> dict[type, Callable[[Plan, Any], None]]:
    """Class of a Hugging Face module -> what to plan for it."""
    prefix = HF_SOURCES[source]
    module = sys.modules[source]

    def fast(part: str) -> type[nn.Module]:
        name = f"Binarized{prefix}{part}"
        return globals().get(name) or __getattr__(name)

    def embeddings(plan: Plan, x: Any) -> None:
        plan.replace(x, "word_embeddings", plan.preset.embedding)

    def attention(plan: Plan, x: Any) -> None:
        if plan.skips(x):
            return
        if x.is_decoder or getattr(x, "is_causal", False):
            plan.skip(x, "a decoder, whose cache and causal mask binary attention does not have")
            return
        for name in ("query", "key", "value"):
            plan.replace(x, name, plan.preset.linear)
        what = plan.add_attention(x, x.query.in_features, x.query.weight)
        plan.swap(x, fast("SelfAttention"), what)

    def dense(plan: Plan, x: Any) -> None:
        plan.replace(x, "dense", plan.preset.linear)

    def layer(plan: Plan, x: Any) -> None:
        up = plan.replace(x.intermediate, "dense", plan.preset.linear)
        down = plan.replace(x.output, "dense", plan.preset.ffn_down)
        if up or down:
            plan.activation(x.intermediate, "intermediate_act_fn")
            plan.swap(x, fast("Layer"))

    def pooler(plan: Plan, x: Any) -> None:
        if plan.replace(x, "dense", plan.preset.linear) and plan.preset.residual_pooler:
            like = x.dense.weight
            norm = nn.LayerNorm(like.shape[0], eps=1e-12, device=like.device, dtype=like.dtype)
            plan.changes.append(Change(x, "LayerNorm", ABSENT, norm))
            plan.swap(x, fast("Pooler"), "tanh(LayerNorm(dense(x)) + x)")

    planned = {
        "Embeddings": embeddings,
        "SelfAttention": attention,
        "SelfOutput": dense,
        "Layer": layer,
        "Pooler": pooler,
    }
    classes = {part: getattr(module, f"{prefix}{part}", None) for part in planned}
    return {cls: planned[part] for part, cls in classes.items() if cls is not None}
