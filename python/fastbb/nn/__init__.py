# SPDX-License-Identifier: Apache-2.0
"""Modules that run on fastbb's operators, and the pieces that backbones are assembled from."""

from fastbb.nn.conv import (
    ConvMlp,
    Downsample,
    GlobalContextStem,
    GlobalQueryGenerator,
    MBConv,
    PatchEmbed,
    PatchMerging,
    SqueezeExcite,
)
from fastbb.nn.elastic_binarize import ElasticBinarize
from fastbb.nn.layers import ClassifierHead, DropPath, LayerScale, Mlp
from fastbb.nn.window_attention import (
    GlobalWindowAttention,
    SpatialReductionAttention,
    WindowAttention,
    WindowAttentionV2,
)

__all__ = [
    "ClassifierHead",
    "ConvMlp",
    "Downsample",
    "DropPath",
    "ElasticBinarize",
    "GlobalContextStem",
    "GlobalQueryGenerator",
    "GlobalWindowAttention",
    "LayerScale",
    "MBConv",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SpatialReductionAttention",
    "SqueezeExcite",
    "WindowAttention",
    "WindowAttentionV2",
]
