"""Config, files and tensor names to tensors and back; presets. No model is imported. Names load at their first use.

files         finds the files of a directory, a Hub repository or a single file
config        the config of a model, frozen and checked
config_rules  values that a config may have
presets       known models as data
names         tensor names of other layouts to diffusers' names
tensors       reads tensors from files: checked, converted, placed
loading       a source that a user names to a checked config and an open checkpoint
report        record of a load, kept as `load_report`
saving        a model directory as diffusers writes it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvae.checkpoints.config import CONFIG_DEFAULTS as CONFIG_DEFAULTS
    from fastvae.checkpoints.config import FrozenConfig as FrozenConfig
    from fastvae.checkpoints.config import unknown_keys as unknown_keys
    from fastvae.checkpoints.config import validate_config as validate_config
    from fastvae.checkpoints.config_rules import ACTIVATIONS as ACTIVATIONS
    from fastvae.checkpoints.config_rules import DOWN_BLOCK_TYPES as DOWN_BLOCK_TYPES
    from fastvae.checkpoints.config_rules import UP_BLOCK_TYPES as UP_BLOCK_TYPES
    from fastvae.checkpoints.loading import model_class_name as model_class_name
    from fastvae.checkpoints.names import rename_table as rename_table
    from fastvae.checkpoints.presets import PRESETS as PRESETS
    from fastvae.checkpoints.presets import Preset as Preset
    from fastvae.checkpoints.report import LoadReport as LoadReport
    from fastvae.checkpoints.saving import save_model as save_model

__all__ = [
    "ACTIVATIONS",
    "CONFIG_DEFAULTS",
    "DOWN_BLOCK_TYPES",
    "PRESETS",
    "UP_BLOCK_TYPES",
    "FrozenConfig",
    "LoadReport",
    "Preset",
    "model_class_name",
    "rename_table",
    "save_model",
    "unknown_keys",
    "validate_config",
]

_WHERE = {
    "ACTIVATIONS": "config_rules",
    "CONFIG_DEFAULTS": "config",
    "DOWN_BLOCK_TYPES": "config_rules",
    "FrozenConfig": "config",
    "LoadReport": "report",
    "PRESETS": "presets",
    "Preset": "presets",
    "UP_BLOCK_TYPES": "config_rules",
    "model_class_name": "loading",
    "rename_table": "names",
    "save_model": "saving",
    "unknown_keys": "config",
    "validate_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
