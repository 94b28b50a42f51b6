"""Bottleneck adapters (Houlsby, Pfeiffer, parallel) as a PEFT method."""

from __future__ import annotations

from ..registry import register_method
from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

register_method("bottleneck", BottleneckConfig, BottleneckModel)
