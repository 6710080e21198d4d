"""Contestants of an encoder or a decoder: the name of each, and the function that prepares it from the same weights.

All have the same weights, dtype, inputs and threads, and are used as their documentation says: fastvae by `accelerate`,
diffusers with its defaults, torch.compile on channels_last, ONNX Runtime and OpenVINO on one exported graph.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing.cases import TINY, Network

# One level and two groups (one program each): Triton's interpreter needs a second.
TINY_CONFIG = {"block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 2}


class LeftOut(Exception):
    """Reason why a contestant takes no part in a case; the table shows it, and the run does not fail."""


@dataclass
class Ready:
    """A contestant that can be timed. given: converts an input for ``run``; result: converts its result to a tensor."""

    run: Callable[[Any], Any]
    given: Callable[[Tensor], Any] = torch.Tensor.contiguous
    result: Callable[[Any], Tensor] = torch.Tensor.clone


class Job:
    """Model, inputs and exported graph of a case. The model is fastvae's, not accelerated."""

    def __init__(self, case: Network, device: torch.device, scratch: Path):
        import fastvae

        self.case, self.device, self.scratch = case, device, scratch
        self.dtype = getattr(torch, case.dtype)
        torch.manual_seed(0)
        if case.preset == TINY:
            vae = fastvae.AutoencoderKL(**TINY_CONFIG)
        else:
            vae = fastvae.AutoencoderKL.from_preset(case.preset, seed=0)
        self.vae: Any = vae.eval().requires_grad_(False).to(device, self.dtype)

    def inputs(self) -> Tensor:
        """Return random pictures in [-1, 1], or random normal latents; NCHW."""
        side, batch, config = self.case.side, self.case.batch, self.vae.config
        generator = torch.Generator().manual_seed(1)
        if self.case.part == "encoder":
            values = torch.rand(batch, config.in_channels, side, side, generator=generator) * 2 - 1
        else:
            small = side // self.vae.downsample_factor
            values = torch.randn(batch, config.latent_channels, small, small, generator=generator)
        return values.to(self.device, self.dtype)

    def copy(self) -> Any:
        """Return a copy of the model, for a contestant that changes it."""
        return copy.deepcopy(self.vae)

    def call(self, vae: Any) -> Callable[[Tensor], Tensor]:
        """Return the function that is timed: moments [B, 2L, h, w] of pictures, or pictures of latents."""
        if self.case.part == "encoder":
            return lambda x: vae.encode(x).latent_dist.parameters
        return lambda z: vae.decode(z).sample

    @functools.cached_property
    def graph(self) -> Path:
        """Path of the network as an ONNX file in fp32, with weights rounded to the case's dtype; exported once."""
        if not self.case.exported:
            raise LeftOut("this case exports no graph")
        path = self.scratch / "network.onnx"
        x = self.inputs().float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter calls its own deprecated functions
            torch.onnx.export(
                _Graph(self.call(self.copy().float())), (x,), str(path), input_names=["x"], output_names=["y"],
                dynamo=True, verbose=False,
            )  # fmt: skip
        return path


class _Graph(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]):
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def channels_last(x: Any) -> Any:
    """Return a tensor, or a model with its weights, in channels_last."""
    if isinstance(x, Tensor):
        return x.contiguous(memory_format=torch.channels_last)
    return x.to(memory_format=torch.channels_last)


def fastvae_accelerated(job: Job) -> Ready:
    """Prepare `accelerate` with its defaults; images in channels_last."""
    return _fastvae(job)


def fastvae_frozen(job: Job) -> Ready:
    """Prepare `accelerate` for fixed weights and repeated shapes: freeze=True, graphs=True."""
    return _fastvae(job, freeze=True, graphs=True)


def _fastvae(job: Job, **promises: Any) -> Ready:
    import fastvae

    vae = fastvae.accelerate(job.copy(), **promises)
    return Ready(vae.encode_moments if job.case.part == "encoder" else job.call(vae), channels_last)


def eager(job: Job) -> Ready:
    """Prepare eager torch in NCHW."""
    return Ready(job.call(job.vae))


def eager_channels_last(job: Job) -> Ready:
    """Prepare eager torch with weights and images in channels_last."""
    return Ready(job.call(channels_last(job.copy())), channels_last)


def diffusers_default(job: Job) -> Ready:
    """Prepare diffusers' class with its defaults, in the case's dtype."""
    kind = importlib.import_module("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL
    vae = kind.from_config(dict(job.vae.config))
    vae.load_state_dict(job.vae.state_dict())
    return Ready(job.call(nn.Module.to(vae.eval().requires_grad_(False), job.device, job.dtype)))


def compiled(job: Job, mode: str) -> Ready:
    """Prepare torch.compile of the channels_last model, for this one shape."""
    if not job.case.compiled:
        raise LeftOut("compiling takes a minute or more: another case does it")
    call = torch.compile(job.call(channels_last(job.copy())), mode=mode, dynamic=False)
    return Ready(call, channels_last)


def onnx_runtime(job: Job) -> Ready:
    """Prepare ONNX Runtime's CPU provider with torch's number of threads."""
    _cpu_alone(job)
    if job.dtype != torch.float32:
        raise LeftOut("ONNX Runtime's CPU provider has no bf16 convolution")
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Without this its threads spin while the next contestant runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(job.graph), options, providers=["CPUExecutionProvider"])
    return Ready(lambda x: session.run(None, {"x": x})[0], lambda x: x.contiguous().numpy(), torch.from_numpy)


def openvino(job: Job) -> Ready:
    """Prepare OpenVINO's CPU device with torch's number of threads; bf16 by a hint, inputs and outputs in fp32."""
    _cpu_alone(job)
    library = importlib.import_module("openvino")
    core = library.Core()
    hints = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[job.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(str(job.graph)), "CPU", hints).create_infer_request()
    return Ready(
        lambda x: request.infer({"x": x})[0],
        lambda x: x.float().contiguous().numpy(),
        lambda y: torch.tensor(y).to(job.dtype),
    )


def _cpu_alone(job: Job) -> None:
    if job.device.type != "cpu":
        raise LeftOut("takes part on a CPU")


# The eager ones come first: their error sets the tolerance of the others. Ratios of speed are over COMPARED.
EAGER, COMPARED = ("eager, NCHW", "eager, channels_last"), "diffusers"
CONTESTANTS: dict[str, Callable[[Job], Ready]] = {
    EAGER[0]: eager,
    EAGER[1]: eager_channels_last,
    COMPARED: diffusers_default,
    "fastvae": fastvae_accelerated,
    "fastvae, frozen": fastvae_frozen,
    "torch.compile": functools.partial(compiled, mode="default"),
    "torch.compile, max-autotune": functools.partial(compiled, mode="max-autotune"),
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}
