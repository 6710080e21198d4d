"""Record of a load, kept on the model as ``load_report``."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvae.system.terminal import first_few


@dataclass
class LoadReport:
    """Record of a load: every tensor that was renamed, converted or left out is in it.

    ``loaded`` and the values of ``renamed`` are diffusers' tensor names. ``dropped`` are names in the file of tensors
    that the model does not have; ``not_read`` those of the half that was not requested. ``dtypes`` counts the loaded
    tensors by their dtype in the file; ``dtype`` is that in the model ("auto": as in the file).
    """

    source: str
    class_name: str
    parts: tuple[str, ...]
    dtype: str
    device: str
    files: tuple[str, ...] = ()
    commit: str | None = None
    loaded: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()
    dtypes: dict[str, int] = field(default_factory=dict)
    unused_config: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def loading_info(self) -> dict[str, list[str]]:
        """Return the record as diffusers' ``output_loading_info``: a load that misses a tensor raises, so none is."""
        unexpected = sorted((*self.dropped, *self.not_read))
        return {"missing_keys": [], "unexpected_keys": unexpected, "mismatched_keys": [], "error_msgs": []}

    def __str__(self) -> str:
        lines = [
            f"{self.class_name} ({' and '.join(self.parts)}) from {self.source}"
            + (f" at commit {self.commit}" if self.commit else ""),
            f"  {len(self.loaded)} tensors loaded from {len(self.files)} file(s), as {self.dtype} on {self.device}"
            + (f" (in the file: {', '.join(f'{n} {d}' for d, n in self.dtypes.items())})" if self.dtypes else ""),
        ]
        lines += self._counted("renamed to diffusers' names", [f"{old} -> {new}" for old, new in self.renamed.items()])
        lines += self._counted("reshaped from 1x1 convolutions", self.reshaped)
        lines += self._counted("of the other half not read", self.not_read)
        lines += self._counted("dropped, no part of this model", self.dropped)
        lines += [f"  config keys not used: {', '.join(self.unused_config)}"] if self.unused_config else []
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    @staticmethod
    def _counted(what: str, names: list[str] | tuple[str, ...]) -> list[str]:
        return [f"  {len(names)} {what}: {first_few(names)}"] if names else []
