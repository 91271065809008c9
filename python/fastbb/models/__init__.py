# SPDX-License-Identifier: Apache-2.0
"""Whole backbones, assembled from `fastbb.nn`, and loaders for other libraries' weights."""

from fastbb.models._registry import create_model, list_models
from fastbb.models.binary_bert import BinaryBert, BinaryBertOutput
from fastbb.models.binary_convert import LoadReport, load_bipft_state_dict
from fastbb.models.binary_vit import BinaryVit
from fastbb.models.convert import export_state_dict, load_state_dict
from fastbb.models.gcvit import GCViT
from fastbb.models.pvt_v2 import PVTv2
from fastbb.models.swin import Swin

__all__ = [
    "BinaryBert",
    "BinaryBertOutput",
    "BinaryVit",
    "GCViT",
    "LoadReport",
    "PVTv2",
    "Swin",
    "create_model",
    "export_state_dict",
    "list_models",
    "load_bipft_state_dict",
    "load_state_dict",
]
