"""PEFT methods that PEFT itself lacks. Importing this package registers them with PEFT.

Heavy: it imports torch and peft, so a tool imports it after its arguments are validated.
"""

from __future__ import annotations

from .bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from .fusion import FusionConfig, FusionLayer, FusionModel
from .registry import AdapterError

__all__ = [
    "AdapterError",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "FusionConfig",
    "FusionLayer",
    "FusionModel",
]
