"""Adapters composed: fused by attention or a gate, or stacked, as a PEFT method."""

from __future__ import annotations

from ..registry import register_method
from .config import KINDS, FusionConfig
from .layer import FusionLayer, forced_weights, recorded_weights
from .model import FusionModel

__all__ = [
    "KINDS",
    "FusionConfig",
    "FusionLayer",
    "FusionModel",
    "forced_weights",
    "recorded_weights",
]

register_method("fusion", FusionConfig, FusionModel)
