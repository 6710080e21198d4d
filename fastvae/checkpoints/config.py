"""Configuration of a model: checked before anything is allocated, then frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvae.checkpoints import config_rules

#: Every constructor key of each class with diffusers' default, in diffusers' order.
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "AutoencoderKLFlux2": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "decoder_block_out_channels": None,
        "layers_per_block": 2,
        "act_fn": "silu",
        "latent_channels": 32,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": (2, 2),
    },
}

#: Largest config.json that is read, in bytes. The largest config in use has two kilobytes.
MAX_BYTES = 2**20

#: Keys that the config of a user's subclass has; no other model class of diffusers has all of them.
SUBCLASS_KEYS = {"block_out_channels", "down_block_types", "up_block_types", "latent_channels", "norm_num_groups"}

#: Class names in older or converted repositories, and the class of the model.
CLASS_ALIASES = {"FlaxAutoencoderKL": "AutoencoderKL"}


class FrozenConfig(dict):
    """Config values, read by attribute or by item; ``json.dumps``, ``deepcopy`` and ``pickle`` work.

    ``hasattr(config, key)`` and ``key in config`` agree. ``dict(config)`` is a copy that can be changed. Raises
    TypeError on any attempt to change it. Source: diffusers.configuration_utils.FrozenDict.
    """

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        # Plain instance attributes, not __getattr__: torch.compile follows them without a graph break.
        self.__dict__.update(self)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _refuse(self, *_: Any, **__: Any) -> Any:
        """Raise TypeError: a config is not changed in place."""
        raise TypeError("the config is frozen: use model.register_to_config(key=value), or dict(config) for a copy")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def check_class_name(config: Mapping[str, Any], class_name: str, source: str) -> None:
    """Raise ValueError, which names the class to use, for a config of another model class.

    A config passes if it has no ``_class_name``. One with an unknown name passes if it has the keys of AutoencoderKL,
    which diffusers writes for a user's subclass. The names and shapes of the weights are checked later.
    """
    found = config.get("_class_name")
    if found is None:
        return
    if not isinstance(found, str):
        raise ValueError(f"{source}: _class_name must be a string, got {found!r}")
    found = CLASS_ALIASES.get(found, found)
    if found == class_name:
        return
    if found in CONFIG_DEFAULTS:
        raise ValueError(f"{source}: this is a {found}, not a {class_name}; load it with fastvae.{found}")
    if config_rules.is_foreign_class(found) or not config.keys() >= SUBCLASS_KEYS:
        raise ValueError(f"{source}: this is a {found}, which fastvae does not have; {class_name} cannot hold it")


def unknown_keys(config: Mapping[str, Any], class_name: str) -> tuple[str, ...]:
    """Return the keys of ``config`` that ``class_name`` does not take, sorted, without those that start with ``_``."""
    known = CONFIG_DEFAULTS[class_name]
    return tuple(sorted(str(key) for key in config if key not in known and not str(key).startswith("_")))


def validate_config(config: Mapping[str, Any], class_name: str, source: str) -> dict[str, Any]:
    """Check a config and return the constructor's arguments, defaults filled in, lists as tuples.

    Keys that start with ``_`` and keys that the class does not take are left out (``unknown_keys`` lists the latter).
    Nothing is allocated, whatever the values. Raises ValueError, which names ``source``, the key, the value and the
    values that are taken. Source: the constructors of diffusers' AutoencoderKL and AutoencoderKLFlux2.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{source}: a config must be a JSON object, got {type(config).__name__}")
    check_class_name(config, class_name, source)
    values = dict(CONFIG_DEFAULTS[class_name])
    values.update((key, value) for key, value in config.items() if key in values)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    config_rules.check(values, source)
    return values


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a config.json. Raises FileNotFoundError or ValueError, which name the file and the fault."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; a model directory needs its config.json") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: a config of more than {MAX_BYTES} bytes is not taken")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a config must be a JSON object, got {type(config).__name__}")
    return config
