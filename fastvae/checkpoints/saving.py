"""A model directory as diffusers writes it: config.json and safetensors, each file complete or not there at all.

Source of the layout: diffusers.models.modeling_utils.ModelMixin.save_pretrained.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastvae.checkpoints.files import CONFIG_NAME, index_name, weights_name

#: The diffusers release whose layout is written.
DIFFUSERS_VERSION = "0.42.1"


def save_model(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    class_name: str,
    directory: str | Path,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a state dict and its config to ``directory``, which is made if needed; stock diffusers loads it.

    Everything is written beside its final name first, then renamed over it, and files of an earlier save of the same
    variant that the new one would not use are removed. Raises ValueError for a file in the directory's place, a
    variant that is no plain word, weights on the meta device, or a shard size that is no size.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: this is a file; save_pretrained takes a directory")
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise ValueError(f"variant must be a plain word such as 'fp16', got {variant!r}")
    shards, index = _shards(_plain(state), variant, _bytes(max_shard_size))
    directory.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], None]] = {}
    for name, inside in shards.items():
        writers[name] = lambda path, inside=inside: save_file(inside, path, metadata={"format": "pt"})
    if index is not None:
        writers[index_name(variant)] = lambda path: _write_json(index, path)
    writers[CONFIG_NAME] = lambda path: _write_json(_saved_config(config, class_name), path)
    _replace_all(directory, writers)
    for path in _superseded(directory, variant, keep=set(writers)):
        path.unlink()


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, each with memory of its own."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save")
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _shards(
    tensors: Mapping[str, Tensor], variant: str | None, max_shard_size: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any] | None]:
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = weights_name(variant, shard="{suffix}")
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    shards = {file: {name: tensors[name] for name in inside} for file, inside in split.filename_to_tensors.items()}
    if not split.is_sharded:
        return shards, None
    return shards, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def _bytes(size: int | str) -> int:
    number = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])B", size.strip().upper())):
        number = int(float(match.group(1)) * 1000 ** ("KMGT".index(match.group(2)) + 1))
    if number <= 0:
        raise ValueError(f"max_shard_size must be a number of bytes above zero or a text such as '5GB', got {size!r}")
    return number


def _saved_config(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **kept}


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_all(directory: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    unfinished = {name: directory / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            unfinished[name].touch()
            permissions = unfinished[name].stat().st_mode
            write(unfinished[name])
            # safetensors makes a file of its own that nobody else may read.
            unfinished[name].chmod(permissions)
            with unfinished[name].open("rb") as file:
                os.fsync(file.fileno())
        for name, path in unfinished.items():
            os.replace(path, directory / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


def _superseded(directory: Path, variant: str | None, keep: set[str]) -> list[Path]:
    """Weights and index of an earlier save of this variant: diffusers would prefer an old index to a new file."""
    stem = re.escape(weights_name(variant, suffix=""))
    own = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index_name(variant))}")
    return [path for path in directory.iterdir() if own.fullmatch(path.name) and path.name not in keep]
