"""Config of a model: registered by the constructor, frozen, read and saved.

Source: diffusers.configuration_utils.ConfigMixin.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from fastvae.checkpoints import loading, saving
from fastvae.checkpoints.config import CONFIG_DEFAULTS, FrozenConfig, unknown_keys, validate_config


def register_to_config(init):
    """Wrap a constructor: check its arguments, with defaults, and keep them as the frozen ``config`` of the instance.

    Source: diffusers.configuration_utils.register_to_config.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        given = {name: value for name, value in arguments.arguments.items() if name != "self"}
        config = validate_config(given, self._class_name(), type(self).__name__)
        object.__setattr__(self, "_config", FrozenConfig(config))
        init(self, **config)

    return wrapper


class ConfigMixin(nn.Module):
    """Module with a frozen ``config``, whose values are read as attributes too (diffusers: ConfigMixin)."""

    _config: FrozenConfig

    def __getattr__(self, name: str) -> Any:
        # Called for names that are not in the instance's dictionary or the class: submodules and parameters first.
        try:
            return super().__getattr__(name)
        except AttributeError:
            config = vars(self).get("_config")
            if config is None or name not in config:
                raise
        warnings.warn(f"{name} is read as an attribute: take config.{name}, as in diffusers", FutureWarning, 2)
        return config[name]

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, **changes: Any) -> Self:
        """Return a model with random weights from a config: values (``vae.config`` too), a directory, or a Hub id.

        ``changes`` replace values of the config. Raises ValueError, which names the key or the class, for values that
        are not legal and for another model's config, before anything is allocated.
        """
        source = "config" if isinstance(config, Mapping) else str(config)
        values = config if isinstance(config, Mapping) else cls.load_config(config)
        if unknown := unknown_keys(changes, cls._class_name()):
            raise TypeError(f"from_config takes values of the config, got {', '.join(unknown)}")
        return cls(**validate_config({**values, **changes}, cls._class_name(), source))

    @classmethod
    def load_config(cls, source: str | Path, **options: Any) -> dict[str, Any]:
        """Return the config.json of a directory, a Hub id or "tiny", unchanged.

        ``options``: subfolder, revision, token, cache_dir, local_files_only. Raises as from_pretrained does.
        """
        return loading.read_config(loading.locate(source, **options))[0]

    @classmethod
    def _class_name(cls) -> str:
        # A user's subclass is saved and loaded under the name of the class it extends, which diffusers has.
        return next(base.__name__ for base in cls.__mro__ if base.__name__ in CONFIG_DEFAULTS)

    @property
    def config(self) -> FrozenConfig:
        """Arguments of the constructor, read-only, by attribute and by item."""
        return self._config

    def register_to_config(self, **changes: Any) -> None:
        """Replace config values, as pipelines do (diffusers: ConfigMixin.register_to_config).

        Raises ValueError, which names the key, for a value that is not legal.
        """
        changed = {**self._config, **changes}
        checked = validate_config(changed, self._class_name(), type(self).__name__)
        object.__setattr__(self, "_config", FrozenConfig({**changed, **checked}))

    def save_config(self, save_directory: str | Path) -> None:
        """Write config.json alone to a directory, which is created if needed. Raises ValueError if it is a file."""
        saving.save_config(self.config, self._class_name(), save_directory)

    def to_json_string(self) -> str:
        """Return the content that save_config writes."""
        return saving.config_text(self.config, self._class_name())
