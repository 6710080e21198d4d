"""Results with values by attribute, by key and by position (diffusers.utils.BaseOutput)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


class BaseOutput:
    """Dataclass with values by attribute, key and position: ``out.name``, ``out["name"]`` and ``out[0]``.

    Source: diffusers.utils.outputs.BaseOutput.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values in their order, without those that are None."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def keys(self) -> tuple[str, ...]:
        """Return the names of the values that are not None."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return dict(zip(self.keys(), self.to_tuple(), strict=True))[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """Result of encode: ``latent_dist``, the posterior over latents."""

    # By name, as in diffusers: vae.py, which has the class, imports this module.
    latent_dist: DiagonalGaussianDistribution  # noqa: F821 # type: ignore[name-defined]
