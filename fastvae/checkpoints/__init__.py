"""Config, files and names to tensors and back; presets. Knows no model."""

from fastvae.checkpoints.config import CONFIG_DEFAULTS, FrozenConfig, unknown_keys, validate_config
from fastvae.checkpoints.loading import model_class_name
from fastvae.checkpoints.names import rename_table
from fastvae.checkpoints.presets import PRESETS, Preset
from fastvae.checkpoints.report import LoadReport
from fastvae.checkpoints.saving import save_model

__all__ = [
    "CONFIG_DEFAULTS",
    "PRESETS",
    "FrozenConfig",
    "LoadReport",
    "Preset",
    "model_class_name",
    "rename_table",
    "save_model",
    "unknown_keys",
    "validate_config",
]
