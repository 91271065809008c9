# SPDX-License-Identifier: Apache-2.0
"""Modules that run on fastbb's operators, and the pieces that backbones are assembled from."""

from fastbb.nn.binary_attention import BinarySelfAttention
from fastbb.nn.binary_bert import BinaryBertLayer, BinaryBertPooler
from fastbb.nn.binary_calibrate import calibrate
from fastbb.nn.binary_linear import BinaryLinear, PackedBinaryLinear
from fastbb.nn.binary_pack import BinaryEmbedding, PackedBinaryEmbedding
from fastbb.nn.binary_presets import PRESETS, Preset
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
    "PRESETS",
    "BinaryBertLayer",
    "BinaryBertPooler",
    "BinaryEmbedding",
    "BinaryLinear",
    "BinarySelfAttention",
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
    "PackedBinaryEmbedding",
    "PackedBinaryLinear",
    "PatchEmbed",
    "PatchMerging",
    "Preset",
    "SpatialReductionAttention",
    "SqueezeExcite",
    "WindowAttention",
    "WindowAttentionV2",
    "calibrate",
]
