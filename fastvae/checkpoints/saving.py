"""Writing a model directory in diffusers' layout: config.json and safetensors, each file complete or absent.

Source of the layout: diffusers.models.modeling_utils.ModelMixin.save_pretrained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastvae.checkpoints.files import CONFIG_NAME, index_name, weights_name
from fastvae.system.atomic_files import replace_together

#: Release of diffusers whose layout is written.
DIFFUSERS_VERSION = "0.42.1"


def save_model(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    class_name: str,
    directory: str | Path,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a state dict and its config to ``directory``, which is created if needed. diffusers loads the result.

    state: tensors [...] of any shape, by diffusers' names. Each file is written under a temporary name and renamed.
    Files of an earlier save of the same variant that the new one does not use are removed. Raises ValueError if
    ``directory`` is a file, and for a variant that is not a plain word, weights on the meta device, or a bad shard
    size.
    """
    directory = _directory(directory)
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise ValueError(f"variant must be a plain word such as 'fp16', got {variant!r}")
    shards, index = _shards(_storable(state), variant, max_shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], None]] = {}
    for name, inside in shards.items():
        writers[name] = lambda path, inside=inside: save_file(inside, path, metadata={"format": "pt"})
    if index is not None:
        writers[index_name(variant)] = lambda path: _write_json(index, path)
    writers[CONFIG_NAME] = lambda path: _write_json(_saved_config(config, class_name), path)
    replace_together(directory, writers)
    for path in _superseded(directory, variant, keep=set(writers)):
        path.unlink()


def save_config(config: Mapping[str, Any], class_name: str, directory: str | Path) -> None:
    """Write config.json to ``directory``, which is created if needed. Raises ValueError if that is a file."""
    directory = _directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = config_text(config, class_name)
    replace_together(directory, {CONFIG_NAME: lambda path: _write_text(text, path)})


def config_text(config: Mapping[str, Any], class_name: str) -> str:
    """Return config.json of a model, as diffusers writes it."""
    return _json_text(_saved_config(config, class_name))


def _directory(directory: str | Path) -> Path:
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: this is a file; save_pretrained takes a directory")
    return directory


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous, each with its own memory."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save")
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        storable[name] = tensor
    return storable


def _shards(
    tensors: Mapping[str, Tensor], variant: str | None, max_shard_size: int | str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any] | None]:
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = weights_name(variant, shard="{suffix}")
    taken = "a number of bytes above zero or a text such as '5GB'"
    refusal = ValueError(f"max_shard_size must be {taken}, got {max_shard_size!r}")
    if not _is_above_zero(max_shard_size):
        raise refusal
    try:
        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except (ValueError, OverflowError):  # the splitter parses the text, and refuses nothing else
        raise refusal from None
    shards = {file: {name: tensors[name] for name in inside} for file, inside in split.filename_to_tensors.items()}
    if not split.is_sharded:
        return shards, None
    return shards, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def _is_above_zero(size: Any) -> bool:
    # The splitter takes a size of zero, and writes each tensor to its own file.
    if isinstance(size, str):
        return re.match(r"\s*[0.]*[1-9]", size) is not None
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _saved_config(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **kept}


def _json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    _write_text(_json_text(content), path)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _superseded(directory: Path, variant: str | None, keep: set[str]) -> list[Path]:
    """Return weights and index of an earlier save of this variant: diffusers loads an old index before a new file."""
    stem = re.escape(weights_name(variant, suffix=""))
    own = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index_name(variant))}")
    return [path for path in directory.iterdir() if own.fullmatch(path.name) and path.name not in keep]
