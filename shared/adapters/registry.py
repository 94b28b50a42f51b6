"""How a method that lives outside PEFT is made known to it."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from tuneutils.shared.errors import ExitCode, ToolError


class AdapterError(ToolError, ValueError):
    """A wrong adapter configuration or operation; a ``ValueError`` too, as PEFT's callers expect."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=ExitCode.USAGE)


def extend_peft_type(name: str) -> PeftType:
    """Return the member ``name`` of `peft.PeftType`, added if absent.

    `register_peft_method` accepts only members of that enum, and Python's enums cannot be subclassed once
    they have members, so the member is made by hand as `enum` itself makes it.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def register_method(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> PeftType:
    """Register a method with PEFT unless it already is.

    Args:
        name: lower-case name; the type in ``adapter_config.json`` is its upper-case form, and the prefix of
            its parameters is ``name_``.
        config_cls: the method's configuration.
        model_cls: the method's tuner.
    """
    peft_type = extend_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    return peft_type
