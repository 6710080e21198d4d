"""Base of every model: loading and saving, dtype and device, size, gradient checkpointing.

Source: diffusers.models.modeling_utils.ModelMixin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.checkpoint import checkpoint

from fastvae.checkpoints import loading, presets, saving
from fastvae.checkpoints.config import validate_config
from fastvae.checkpoints.report import LoadReport
from fastvae.checkpoints.tensors import Checkpoint, check_parts, convertible_dtype, read_tensors
from fastvae.models.configuration_utils import ConfigMixin
from fastvae.models.in_pipelines import InPipelines

BOTH_PARTS = ("encoder", "decoder")


class ModelMixin(InPipelines, ConfigMixin):
    """Module with a config, loading and saving, dtype and device, and gradient checkpointing.

    Source: diffusers.models.modeling_utils.ModelMixin.
    """

    # Read by diffusers' hooks and tests, and by trainers.
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _keep_in_fp32_modules: list[str] | None = None
    _skip_layerwise_casting_patterns: tuple[str, ...] | None = None

    load_report: LoadReport | None = None
    """Record of what the load read, renamed and left out; None for a model that was not loaded."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        parts: Iterable[str] = BOTH_PARTS,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        use_safetensors: bool | None = None,
        allow_pickle: bool = False,
        low_cpu_mem_usage: bool = True,
        output_loading_info: bool = False,
    ) -> Self:
        """Load a model from a directory in diffusers' layout, a Hub id, or "tiny" (the embedded one), in eval mode.

        ``torch_dtype`` (or ``dtype``) None means float32, "auto" that of the file (of float8, float32).
        ``parts=("encoder",)`` reads no tensor of the decoder and leaves it None. A pickle is refused unless
        ``allow_pickle`` (``use_safetensors``, which pipelines pass, may not be False without it). ``load_report``
        records the load. ``low_cpu_mem_usage`` changes nothing: no random weights are made.
        ``output_loading_info=True`` returns (model, info) as diffusers does, with the tensors of the file that were not
        taken as ``unexpected_keys``. Raises FileNotFoundError, ConnectionError or ValueError, which name the file, key
        or tensor. Source: diffusers.models.modeling_utils.ModelMixin.from_pretrained.
        """
        if use_safetensors is False and not allow_pickle:
            raise ValueError("use_safetensors=False asks for a pickle: say allow_pickle=True as well")
        parts = check_parts(parts)
        target = convertible_dtype(torch_dtype, dtype)
        repository = loading.locate(
            source,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config, opened, unused = loading.open_pretrained(repository, cls._class_name(), variant, allow_pickle)
        report = loading.new_report(source, cls._class_name(), parts, target, device)
        report.unused_config = unused
        model = cls._from_checkpoint(config, opened, report, target, device)
        return (model, report.loading_info()) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        preset: str | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        parts: Iterable[str] = BOTH_PARTS,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        allow_pickle: bool = False,
    ) -> Self:
        """Load the VAE from one file, given as a path or a Hub address, with original (LDM) or diffusers' names.

        Scaling is not in the file, so ``preset`` (see ``fastvae.checkpoints.PRESETS``) or ``config`` (values, a file,
        a directory or Hub id with ``subfolder``) gives it, unless the tensors fit only one known model. The other
        arguments are those of from_pretrained. Raises ValueError, which lists the presets that fit.
        Source: diffusers.loaders.single_file_model.FromOriginalModelMixin.from_single_file.
        """
        parts = check_parts(parts)
        target = convertible_dtype(torch_dtype, dtype)
        repository = loading.Repository(str(source), subfolder, revision, token, cache_dir, local_files_only)
        values, opened, notes = loading.open_single_file(
            source, repository, cls._class_name(), preset, config, allow_pickle, parts
        )
        report = loading.new_report(source, cls._class_name(), parts, target, device)
        report.notes = notes
        return cls._from_checkpoint(values, opened, report, target, device, strict=False)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        parts: Iterable[str] = BOTH_PARTS,
    ) -> Self:
        """Return a model of a known architecture and scaling with random weights, in eval mode.

        The same ``seed`` gives the same weights on every device and does not change torch's generators; None draws from
        the global one. Raises ValueError, which lists the presets, for an unknown ``name``, and as from_pretrained does
        for ``torch_dtype`` (or ``dtype``).
        """
        parts = check_parts(parts)
        target = convertible_dtype(torch_dtype, dtype) or torch.float32  # no file here: "auto" is fp32
        config = presets.find_preset(name, cls._class_name()).config
        model = cls._seeded(validate_config(config, cls._class_name(), f"preset {name!r}"), seed)
        model._drop_other_parts(parts)
        return model.to(device=device, dtype=target).eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write config.json and safetensors that from_pretrained and diffusers load.

        Each file is written completely or not at all. ``is_main_process=False`` writes nothing, for all ranks but one
        of a distributed run. Raises ValueError for half a model or ``safe_serialization=False`` (pickles are not
        written), and as checkpoints.save_model does. Source:
        diffusers.models.modeling_utils.ModelMixin.save_pretrained.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: weights are written as safetensors alone")
        halves = [part for part in BOTH_PARTS if getattr(self, part, None) is None]
        if halves:
            raise ValueError(
                f"this model has no {halves[0]}, and half a model is no checkpoint; load it with both parts"
            )
        if is_main_process:
            state, name = self.state_dict(), self._class_name()
            saving.save_model(state, self.config, name, save_directory, variant, max_shard_size)

    @classmethod
    def _from_checkpoint(
        cls,
        config: Mapping[str, Any],
        opened: Checkpoint,
        report: LoadReport,
        dtype: torch.dtype | None,
        device: torch.device | str,
        strict: bool = True,
    ) -> Self:
        with torch.device("meta"):
            model = cls(**config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = read_tensors(opened, shapes, report, dtype, torch.device(device), strict)
        model._drop_other_parts(report.parts)
        model.load_state_dict(tensors, assign=True)
        model.register_to_config(_name_or_path=report.source)
        model.load_report = report
        return model.eval()

    @classmethod
    def _seeded(cls, config: Mapping[str, Any], seed: int | None) -> Self:
        if seed is None:
            return cls(**config)
        # Only the CPU's generator: torch.manual_seed reseeds every GPU too, and fork_rng does not restore those here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(**config)

    def _drop_other_parts(self, parts: tuple[str, ...]) -> None:
        if "encoder" not in parts:
            self.encoder, self.quant_conv = None, None
        if "decoder" not in parts:
            self.decoder, self.post_quant_conv = None, None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters; ``exclude_embeddings`` changes nothing, since there are none."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of parameters and, unless ``return_buffers`` is False, of buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True if any block recomputes its activations in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled  # type: ignore[assignment]
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
