"""The model of a run: opening it, checking that a store can hold its latents, and its identity."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastvae.checkpoints.loading import TINY
from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import STORE
from fastvae.data.store.store import Store
from fastvae.fast.accelerate import unwrapped
from fastvae.fast.fallback_reasons import BUILT_IN_PROCESSORS, Reason, why_not_shape
from fastvae.latents.autoencoder import check_autoencoder, described_model
from fastvae.latents.wrappers import model_inside
from fastvae.system.atomic_files import sha256_of
from fastvae.system.terminal import print_stderr

# Modules whose attention processors are known, by fastvae and by diffusers.
PROCESSOR_MODULES = ("fastvae.models.attention_processor", "diffusers.models.attention_processor")
# Weights that make latents; the decoder's do not.
ENCODER_PARTS = ("encoder.", "quant_conv.", "bn.")
# Names of the module inside torch.compile's wrapper, and inside those of data parallelism.
WRAPPED = re.compile(r"\.(_orig_mod|module)(?=\.)")


def open_model(
    source: str,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    parts: tuple[str, ...] = ("encoder", "decoder"),
    preset: str | None = None,
) -> Any:
    """Load the model at ``source`` (a directory, a Hub id, a single file or "tiny") on the CPU.

    Its class is that of its config; of a single file, that of ``preset`` or of its tensors. Raises what from_pretrained
    and from_single_file raise, and ValueError for a preset of another source.
    """
    from fastvae import models
    from fastvae.checkpoints import model_class_name
    from fastvae.checkpoints.loading import is_single_file, single_file_class

    if is_single_file(source):
        kind = getattr(models, single_file_class(source, revision, preset))
        return kind.from_single_file(source, preset=preset, revision=revision, torch_dtype=dtype, parts=parts)
    if preset is not None:
        raise ValueError(f"preset must be left out, got {preset!r}: it is for single files, and {source} has a config")
    kind = getattr(models, model_class_name(source, subfolder=subfolder, revision=revision))
    return kind.from_pretrained(source, subfolder=subfolder, revision=revision, torch_dtype=dtype, parts=parts)


def load_model(
    vae: Any, subfolder: str | None, revision: str | None, preset: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the model and where it came from, for decode to load it again.

    It is loaded in fp32 for every dtype of the run, so that the same weights have the same digest; a wrapped object is
    unwrapped. Raises what check_model and model_inside raise.
    """
    if isinstance(vae, torch.nn.Module):
        vae = model_inside(vae)
        check_model(vae)
        return vae, {"vae": type(vae).__name__, "object": True}
    name = name_of(vae)
    model = open_model(name, subfolder, revision, torch.float32, ("encoder",), preset)
    check_model(model)
    folder = os.path.abspath(os.path.expanduser(name))
    if name != TINY and os.path.exists(folder):
        name = folder  # a later decode may run in another folder
    made_with = {"vae": name, "subfolder": subfolder, "revision": revision}
    return model, made_with if preset is None else {**made_with, "preset": preset}


def name_of(vae: Any) -> str:
    """Return the name or path of a model as a string. Raises ValueError for what is neither."""
    if not isinstance(vae, str | os.PathLike):
        raise ValueError(
            f'vae must be a loaded model, or its directory, Hub id, single file or "{TINY}", got {described_model(vae)}'
        )
    return os.fspath(vae)


def named_model(
    store: Store, vae: Any, subfolder: str | None, revision: str | None, preset: str | None = None
) -> tuple[Any, str | None, str | None, str | None]:
    """Return ``vae`` if given, else the model that the store names, with its subfolder, revision and preset.

    A store may come from somebody else, so the model's name is printed on stderr before it is opened. Raises ValueError
    for a store that was made with a model object, which has no name.
    """
    if vae is not None:
        return vae, subfolder, revision, preset
    source = store.facts["source"]
    if source.get("object"):
        raise ValueError(f"vae must be given: the store was made with a {source['vae']} object, not a file")
    parts = [subfolder or source.get("subfolder"), revision or source.get("revision") or source.get("commit")]
    parts.append(preset or source.get("preset"))
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise StoreError(
            f"{store.path / STORE} is damaged: source.subfolder, source.revision and source.preset must be text"
        )
    if source["vae"] != TINY:
        place = ", ".join(" ".join(part.split()) for part in (source["vae"], *parts) if part)
        print_stderr(f"model   {place}: named by the store; --vae takes another\n")
    return source["vae"], parts[0], parts[1], parts[2]


def hub_commit(model: Any) -> str | None:
    """Return the commit on the Hub that the weights of ``model`` were read from, None for other weights."""
    return getattr(getattr(model, "load_report", None), "commit", None)


def weight_files(model: Any) -> list[dict[str, str]]:
    """Return name and sha256 of the files that the weights were read from."""
    files = getattr(getattr(model, "load_report", None), "files", None) or []
    return [{"name": Path(file).name, "sha256": sha256_of(Path(file))} for file in files if Path(file).is_file()]


def model_identity(vae: torch.nn.Module) -> dict[str, Any]:
    """Return the config of ``vae`` and the sha256 of the weights that make latents (without the decoder).

    Raises ValueError for a model without such weights: a digest of no tensor is the same for all of them.
    """
    hasher = hashlib.sha256()
    # A wrapper around the encoder alone is no part of the model.
    state = {WRAPPED.sub("", name): value for name, value in vae.state_dict().items()}
    names = sorted(name for name in state if name.startswith(ENCODER_PARTS))
    if not any(name.startswith("encoder.") for name in names):
        raise ValueError(f"vae must have weights of an encoder, 'encoder.*', got {type(vae).__name__} with none")
    for name in names:
        # Hashed in fp32, so that a model object in bf16 has the digest of its file, which is read in fp32.
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}  # type: ignore[arg-type]
    return {
        "class": type(vae).__name__,
        "config": json.loads(json.dumps(config, default=str)),
        "encoder_weights_sha256": hasher.hexdigest(),
    }


def model_facts(
    source: str, subfolder: str | None = None, revision: str | None = None, preset: str | None = None
) -> dict[str, Any]:
    """Return class, parameters, dtype, scaling and config of a model; raises what from_pretrained raises.

    ``presets``: the known models that have this config; their weights are not compared.
    """
    from fastvae.checkpoints.presets import matching
    from fastvae.latents.scaling import scaling_of

    vae = open_model(source, subfolder, revision, preset=preset)
    parts = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in vae.named_children()}
    return {
        "kind": "model",
        "source": source,
        "class": type(vae).__name__,
        "presets": [preset.name for preset in matching(vae.config, type(vae).__name__)],
        "parameters": sum(parts.values()),
        "parameters_of": parts,
        "dtype": str(next(vae.parameters()).dtype).removeprefix("torch."),
        "latent_channels": vae.config.latent_channels,
        "downsample_factor": vae.downsample_factor,
        "scaling": scaling_of(vae),
        "config": dict(vae.config),
    }


def check_model(vae: Any) -> None:
    """Raise ValueError, naming the class, for a model whose latents a store cannot hold or identify."""
    check_autoencoder(vae)
    kind = type(vae).__name__
    if getattr(vae, "encoder", None) is None:
        raise ValueError(f"vae must have an encoder, got {kind} without one")
    if any(weight.device.type == "meta" for weight in vae.encoder.parameters()):
        raise ValueError(
            f"vae must have its weights in memory, got {kind} with offloaded ones: remove the offload hooks"
        )
    if vae.config.in_channels != 3:
        raise ValueError(f"vae must take RGB images, got {kind}, which takes {vae.config.in_channels}-channel images")
    expected = 2 * vae.config.latent_channels
    given = _moment_channels(vae)
    if given != expected:
        found = "has no convolution at the end of its encoder" if given is None else f"gives {given}"
        raise ValueError(
            f"vae must give mean and log-variance, {expected} channels for its {vae.config.latent_channels} latent "
            f"channels, got {kind}, which {found}"
        )
    encoder = unwrapped(vae.encoder)
    if why_not_shape(encoder) is Reason.UNSUPPORTED_LAYER:
        raise ValueError(
            f"vae must have an encoder built like AutoencoderKL's, got {kind} with a {type(encoder).__name__}"
        )
    _check_processors(vae.encoder, kind)


def _moment_channels(vae: Any) -> int | None:
    last = getattr(vae, "quant_conv", None) or getattr(vae.encoder, "conv_out", None)
    weight = getattr(last, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 4 else None


def _check_processors(encoder: torch.nn.Module, kind: str) -> None:
    for name, module in encoder.named_modules():
        processor = getattr(module, "processor", None)
        found = type(processor)  # the exact class: a subclass may compute something else
        if processor is None:
            continue
        if found.__name__ not in BUILT_IN_PROCESSORS or found.__module__ not in PROCESSOR_MODULES:
            raise ValueError(
                f"vae must compute attention by a built-in processor ({', '.join(BUILT_IN_PROCESSORS)}), got {kind} "
                f"with {found.__name__} at encoder.{name}: the store's identity could not distinguish its latents"
            )
