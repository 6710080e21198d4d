"""Results with values by attribute, by key and by position (diffusers.utils.BaseOutput)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from torch.utils import _pytree


class BaseOutput(OrderedDict):
    """Dataclass that is a dict of its values that are not None: ``out.name``, ``out["name"]`` and ``out[0]``.

    Subclasses are nodes of torch's pytree. As in diffusers and transformers a dict of the fields may stand first among
    the arguments: accelerate builds its converted copies so. Raises TypeError on any removal of a value.
    Source: diffusers.utils.outputs.BaseOutput.
    """

    def __init_subclass__(cls) -> None:
        # DistributedDataParallel with static_graph finds the tensors of a result by the pytree.
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in names}
        first = values[names[0]]
        if isinstance(first, Mapping) and all(values[name] is None for name in names[1:]):
            values = dict(first)
        for name, value in values.items():
            if value is not None:
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values in their order, without those that are None."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in self:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raise TypeError: an attribute and its key must not differ."""
        raise TypeError(f"the values of {type(self).__name__} can be replaced and not removed: make a dict(...) of it")

    __delitem__ = pop = popitem = clear = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """Result of encode: ``latent_dist``, the posterior over latents."""

    # By name, as in diffusers: vae.py, which has the class, imports this module.
    latent_dist: DiagonalGaussianDistribution  # noqa: F821 # type: ignore[name-defined]
