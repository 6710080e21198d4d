"""From a source that a user names to a checked config and an open checkpoint. Models are built in fastvae.models."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvae.checkpoints import names
from fastvae.checkpoints.config import (
    CLASS_ALIASES,
    CONFIG_DEFAULTS,
    read_config_file,
    unknown_keys,
    validate_config,
)
from fastvae.checkpoints.files import (
    PICKLE_SUFFIXES,
    Repository,
    WeightFiles,
    find_config,
    find_single_file,
    find_weights,
)
from fastvae.checkpoints.presets import PRESETS, Preset, candidates, find_preset, structure, unlike
from fastvae.checkpoints.report import LoadReport
from fastvae.checkpoints.tensors import Checkpoint
from fastvae.system.terminal import first_few

#: The name under which ``from_pretrained`` loads the model that ships with the package.
TINY = "tiny"
_PLAYGROUND_SCALING_FACTOR = 0.5


def full_name(source: str) -> str:
    """Return the name of a model for the plan line of a command; "tiny" with its purpose."""
    purpose = " (a model for trying things out: no diffusion model knows its latents)"
    return source + purpose * (source == TINY)


def locate(source: str | Path, **options: Any) -> Repository:
    """Return the repository of a directory, a Hub id or "tiny"; ``options`` are the other fields of Repository.

    A directory named tiny is given as ./tiny. Raises FileNotFoundError for a name without a slash that is no directory
    (the Hub's ids of VAEs have one, and a mistyped name would be tried for half a minute), and if this installation has
    no tiny model.
    """
    if not str(source):
        raise FileNotFoundError(f'the model must be a folder, a Hub id, a single file or "{TINY}", got an empty name')
    if str(source) != TINY:
        repository = Repository(str(source), **options)
        if repository.directory is None and not set("/\\") & set(str(source)):
            preset = "; a preset has no weights" if source in PRESETS else ""
            raise FileNotFoundError(
                f'{source} is no folder, and not the id of a Hub repository, such as OWNER/NAME, or "{TINY}"{preset}'
            )
        return repository
    folder = Path(str(importlib.resources.files("fastvae"))) / "assets" / TINY
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f'"{TINY}": this installation does not carry the embedded model ({folder} is missing)')
    return Repository(str(folder))


def read_config(repository: Repository) -> tuple[dict[str, Any], Repository, Path]:
    """Return a model's config as it is in the file, the repository at the commit of that file, and the file."""
    path = find_config(repository)
    return read_config_file(path), repository.pinned(path), path


def model_class_name(source: str | Path, **options: Any) -> str:
    """Return the class of a model directory or Hub repository, "AutoencoderKL" or "AutoencoderKLFlux2".

    ``options``: subfolder, revision, token, cache_dir, local_files_only. A config without a class name is that of an
    AutoencoderKL. Raises as ``from_pretrained`` does, and ValueError for a class that fastvae does not have.
    """
    config, _, path = read_config(locate(source, **options))
    name = config.get("_class_name") or "AutoencoderKL"
    name = CLASS_ALIASES.get(name, name)
    if name not in CONFIG_DEFAULTS:
        raise ValueError(f"{path}: this is a {name}; fastvae has {' and '.join(CONFIG_DEFAULTS)}")
    return name


def is_single_file(source: str | Path) -> bool:
    """Return True if ``source`` is a file, or has the name of a file of weights and is no directory."""
    path = Path(source).expanduser()
    return path.is_file() or (path.suffix in (".safetensors", ".sft", *PICKLE_SUFFIXES) and not path.is_dir())


def single_file_class(source: str | Path, revision: str | None = None, preset: str | None = None) -> str:
    """Return the class of a single file: that of ``preset``, else by its tensors. Raises as from_single_file does."""
    if preset in PRESETS:
        return PRESETS[preset].class_name
    repository = Repository(str(source), revision=revision)
    checkpoint = Checkpoint(WeightFiles(repository, single=find_single_file(str(source), repository)))
    is_flux2 = "bn.running_mean" in names.rename_table(checkpoint.names).values()
    return "AutoencoderKLFlux2" if is_flux2 else "AutoencoderKL"


def open_pretrained(
    repository: Repository, class_name: str, variant: str | None, allow_pickle: bool
) -> tuple[dict[str, Any], Checkpoint, tuple[str, ...]]:
    """Return the constructor's arguments, the checkpoint and the unused config keys of a model in diffusers' layout."""
    raw, repository, path = read_config(repository)
    config = validate_config(raw, class_name, str(path))
    checkpoint = Checkpoint(find_weights(repository, variant, allow_pickle), allow_pickle)
    return config, checkpoint, unknown_keys(raw, class_name)


def open_single_file(
    source: str | Path,
    repository: Repository,
    class_name: str,
    preset: str | None,
    config: Mapping[str, Any] | str | Path | None,
    allow_pickle: bool,
    parts: tuple[str, ...] = tuple(names.PART_ROOTS),
) -> tuple[dict[str, Any], Checkpoint, tuple[str, ...]]:
    """Open a single file, given as a path or a Hub address.

    parts: halves that are read; the shapes of the other half decide nothing. Returns the constructor's arguments, the
    checkpoint, and notes on how the config was chosen.
    """
    if preset is not None and config is not None:
        raise ValueError("preset and config were both given; one of them is taken")
    # A wrong preset is refused before a file is downloaded.
    chosen = find_preset(preset, class_name) if preset is not None else None
    path = find_single_file(str(source), repository)
    checkpoint = Checkpoint(WeightFiles(repository, single=path), allow_pickle)
    shapes = checkpoint.shapes()
    renamed = {new: shapes[old] for old, new in names.rename_table(shapes).items()}
    if not renamed:
        raise ValueError(f"{path}: holds no VAE: {first_few(checkpoint.names) or 'it has no tensors'}")
    renamed = {name: shape for name, shape in renamed.items() if names.part_of(name, parts)}
    statistics = _latent_statistics(checkpoint, path)
    if config is not None:
        raw, origin = _given_config(config, repository)
        unused = unknown_keys(raw, class_name) if isinstance(raw, Mapping) else ()
        notes = (f"config from {origin}" + (f", keys not used: {', '.join(unused)}" if unused else ""),)
    else:
        if chosen and statistics and chosen.config.get("latents_mean") is None:
            message = "carries edm_mean and edm_std, as Playground v2.5 does"
            raise ValueError(f'{path}: {message}, and {chosen.name!r} has none; pass preset="playground-v2.5"')
        by_name = chosen is not None
        chosen = chosen or _choose(renamed, class_name, bool(statistics), path)
        raw, origin = chosen.config, str(path)
        notes = (f"preset {chosen.name!r} ({chosen.source})" + ("" if by_name else ", chosen by what the file holds"),)
    # Statistics of a given config override those of the file; those of a preset are the file's, rounded.
    has_own_statistics = config is not None and raw.get("latents_mean") is not None
    values = validate_config(raw if has_own_statistics else {**raw, **statistics}, class_name, origin)
    _check_fit(values, renamed, path)
    return values, checkpoint, notes


def new_report(source: object, class_name: str, parts: tuple[str, ...], dtype: object, device: object) -> LoadReport:
    """Return an empty report; ``dtype`` None means that of the file."""
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    return LoadReport(str(source), class_name, parts, name, str(device))


def _choose(shapes: Mapping[str, tuple[int, ...]], class_name: str, has_statistics: bool, path: Path) -> Preset:
    if has_statistics:
        return find_preset("playground-v2.5", class_name)
    fitting = candidates(shapes)
    others = [preset for preset in fitting if preset.class_name != class_name]
    if others:
        raise ValueError(
            f"{path}: this is a {others[0].class_name}, not a {class_name}; use fastvae.{others[0].class_name}"
        )
    if len(fitting) == 1 and fitting[0].verified:
        return fitting[0]
    if not fitting:
        found = _shown(structure(shapes)) or "no layer of an AutoencoderKL"
        raise ValueError(f"{path}: fits no preset ({found}); pass config= with its values")
    listed = ", ".join(f"{preset.name!r} ({_scaling(preset)})" for preset in fitting)
    raise ValueError(
        f"{path}: the tensors do not say how latents are scaled; pass preset= (--preset) one of {listed}, or config="
    )


def _check_fit(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    wrong = unlike(values, shapes)
    if wrong:
        expected = _shown({key: values.get(key) for key in wrong})
        fitting = ", ".join(preset.name for preset in candidates(shapes)) or "none"
        message = f"the file holds {_shown(wrong)}, the config says {expected}; presets that fit: {fitting}"
        raise ValueError(f"{path}: {message}")


def _given_config(config: Mapping[str, Any] | str | Path, repository: Repository) -> tuple[Mapping[str, Any], str]:
    if isinstance(config, Mapping):
        return config, "config"
    path = Path(config).expanduser()
    if path.is_file():
        return read_config_file(path), str(path)
    options = {name: getattr(repository, name) for name in ("token", "cache_dir", "local_files_only", "subfolder")}
    raw, _, found = read_config(locate(config, **options))
    return raw, str(found)


def _latent_statistics(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Return Playground's edm_mean and edm_std as config values (diffusers: create_vae_diffusers_config_from_ldm)."""
    keys = {"edm_mean": "latents_mean", "edm_std": "latents_std"}
    if not set(keys) <= set(checkpoint.names):
        return {}
    found: dict[str, Any] = {}
    for name, tensor in checkpoint.read(keys):
        if not tensor.is_floating_point() or tensor.numel() > 1024:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}; one number per latent channel is taken")
        found[keys[name]] = tuple(tensor.double().flatten().tolist())
    return {**found, "scaling_factor": _PLAYGROUND_SCALING_FACTOR}


def _scaling(preset: Preset) -> str:
    shift = preset.config.get("shift_factor")
    factor = preset.config.get("scaling_factor")
    mean = ", latents_mean" if preset.config.get("latents_mean") else ""
    return f"scaling_factor {factor}" + (f", shift_factor {shift}" if shift is not None else "") + mean


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
