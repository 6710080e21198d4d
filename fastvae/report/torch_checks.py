"""Checks of ``fastvae doctor`` that need torch: kernels, numbers, fallbacks and image decoding."""

from __future__ import annotations

import copy
import io
import subprocess
import time
from typing import Any

import torch
from fastvae_kernels.cpu.library import build_name, why_not
from fastvae_kernels.shared.runtime import HAS_TRITON, INTERPRETED, triton

from fastvae.data.images.read import read_image
from fastvae.fast.accelerate import accelerate
from fastvae.fast.forms import tables
from fastvae.fast.forms.device_name import name_of
from fastvae.fast.forms.form import Form
from fastvae.latents.scaling import downsample_factor, pixel_multiple, scaling_of
from fastvae.report.benchmark import explained
from fastvae.report.contestants import decoding, encoding, first_line, images, open_fp32
from fastvae.report.correctness import truth_of
from fastvae.report.findings import BAD, NOTE, OK, Finding
from fastvae.report.timing import synchronised
from fastvae.system.devices import DTYPES, default_dtype

# Errors of a kernel's launch: no C compiler (RuntimeError), one without Python's headers (CalledProcessError), a
# library that cannot be loaded (OSError), and Triton's compile errors.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (RuntimeError, OSError, subprocess.CalledProcessError)
if HAS_TRITON:
    from triton.errors import TritonError

    LAUNCH_ERRORS += (TritonError,)


def check_kernels(device: torch.device) -> Finding:
    """Check Triton; on a GPU compile and launch a kernel and compare its result."""
    if not HAS_TRITON:
        sentence = "Triton is not installed, so no fused kernel can run: pip install triton (Linux only)"
        return Finding("kernels", BAD if device.type == "cuda" else NOTE, sentence)
    facts = {"triton": triton.__version__, "interpreted": INTERPRETED}
    if INTERPRETED:
        sentence = "TRITON_INTERPRET=1 is for debugging kernels: unset it. A CPU ignores it; a GPU becomes thousands "
        sentence += "of times slower"
        return Finding("kernels", BAD if device.type == "cuda" else NOTE, sentence, facts)
    if device.type != "cuda":
        sentence = f"Triton {triton.__version__} is installed, but its kernels need a GPU: a CPU takes the path cpu, "
        sentence += f"with C kernels {build_name()}" if why_not() is None else f"without C kernels: {why_not()}"
        return Finding("kernels", NOTE, sentence, facts | {"cpu_kernels": build_name()})
    return check_launch(device, facts)


def check_launch(device: torch.device, facts: dict[str, Any]) -> Finding:
    """Check that a kernel can be compiled and launched on ``device``, and that its result is right."""
    from fastvae_kernels import group_norm_silu

    x = torch.randn(2, 32, 16, 16, dtype=torch.float32, device=device).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 32, dtype=torch.float32, device=device)
    begin = time.perf_counter()
    try:
        got = group_norm_silu.group_norm_silu(x, weight, bias, 8, 1e-6)
        synchronised(device)
    except LAUNCH_ERRORS as error:
        sentence = (
            f"a kernel could not be compiled or launched: {first_line(error)} (Triton needs a C compiler such as gcc)"
        )
        return Finding("kernels", BAD, sentence, facts)
    took = time.perf_counter() - begin
    exact = group_norm_silu.reference(x.double(), weight.double(), bias.double(), 8, 1e-6)
    plain = group_norm_silu.reference(x, weight, bias, 8, 1e-6)
    error = (got - exact).abs().max().item()
    # The project's tolerance: twice the error of plain torch, plus one rounding.
    if not error <= 2 * (plain - exact).abs().max().item() + torch.finfo(x.dtype).eps * exact.abs().max().item():
        sentence = f"a kernel ran, and its result is wrong by {error:.2g}: call fastvae.restore and report this GPU"
        return Finding("kernels", BAD, sentence, facts)
    return Finding(
        "kernels", OK, f"Triton {triton.__version__} runs kernels on this GPU, the first after {took:.1f} s", facts
    )


def check_model(vae: str, subfolder: str | None, revision: str | None, preset: str | None) -> tuple[Finding, Any]:
    """Load the model at ``vae``; return the finding, and the model in fp32 on the CPU, or None."""
    try:
        model, weights = open_fp32(vae, subfolder, revision, preset)
    except (ValueError, OSError, TypeError) as error:
        return Finding("model", BAD, f"the model {vae} cannot be used: {first_line(error)}", {"vae": vae}), None
    facts = {
        "vae": vae,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latent_channels": model.config.latent_channels,
        "downsample_factor": downsample_factor(model),
        "scaling": scaling_of(model),
        "weights": weights,
    }
    sentence = (
        f"{vae}: {facts['class']}, {facts['parameters'] / 1e6:.2g} M parameters, {facts['latent_channels']} latent "
        f"channels, {facts['downsample_factor']} pixels a latent, weights {weights}"
    )
    return Finding("model", OK, sentence, facts), model


def check_numbers(vae: str, model: Any, device: torch.device) -> Finding:
    """Check an encode and a decode of the accelerated model against float64, in the device's default dtype."""
    dtype = default_dtype(device)
    facts: dict[str, Any] = {"dtype": dtype}
    within = []
    try:
        plain = copy.deepcopy(model).to(device=device, dtype=DTYPES[dtype])
        fast = accelerate(copy.deepcopy(plain))
        x = images(plain, 128 if device.type == "cuda" else 8 * pixel_multiple(plain), 1)
        with torch.no_grad():
            for task, call in (("encode", encoding(fast)), ("decode", decoding(fast))):
                truth = truth_of(plain, task, x)
                begin = time.perf_counter()
                y = call(x)
                took = time.perf_counter() - begin
                error, allowed, wrong = truth.judge(y)
                facts[task] = {"error": error, "allowed_error": allowed, "seconds": took}
                if wrong:
                    sentence = f"{vae}: an image was {task}d {wrong}: use another version of torch or Triton"
                    return Finding("numbers", BAD, sentence, facts)
                within.append(f"{task}s an image within {error:.2g} of float64 (allowed: {allowed:.2g})")
                x = truth.values.chunk(2, dim=1)[0].contiguous().to(x)
    except LAUNCH_ERRORS as error:
        return Finding("numbers", BAD, f"{vae} could not encode and decode an image: {first_line(error)}", facts)
    return Finding("numbers", OK, f"{vae} in {dtype} {' and '.join(within)}", facts)


def check_paths(vae: str, model: Any, device: torch.device) -> Finding:
    """Check which blocks of a model are fused on ``device``, and why others fall back."""
    dtype = default_dtype(device)
    model = accelerate(copy.deepcopy(model).to(device=device, dtype=DTYPES[dtype]))
    with torch.no_grad():
        rows = explained(model, (1, model.config.in_channels, 256, 256))
    return judge_paths(f"{vae} on {device} in {dtype}", rows)


def judge_paths(label: str, rows: list[dict[str, Any]]) -> Finding:
    """Return the finding of explain's rows. label: model, device and dtype."""
    facts = {"blocks": rows}
    reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
    if not reasons:
        return Finding("paths", OK, f"{label}: all {len(rows)} blocks are fused", facts)
    listed = "; ".join(reason.partition(": ")[2] for reason in reasons)
    if all(row["path"] == "cpu" for row in rows):
        return Finding("paths", NOTE, f"{label}: every block takes the path cpu ({listed})", facts)
    left = [row["name"] for row in rows if row["reason"]]
    if len(left) == len(rows):
        return Finding("paths", NOTE, f"{label}: no block is fused ({listed})", facts)
    named = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    fused = f"{len(rows) - len(left)} of {len(rows)} blocks are fused"
    return Finding("paths", NOTE, f"{label}: {fused}; not fused: {named} ({listed})", facts)


def check_forms(device: torch.device) -> Finding:
    """Check that there is a table of the forms of convolutions for ``device``."""
    name = name_of(device)
    try:
        entries = tables.forms_of(device).entries
    except ValueError as error:
        return Finding("forms", BAD, str(error), {"device": name})
    own, why_not = tables.users_entries(name)
    facts = {"device": name, "entries": len(entries), "own": bool(own)}
    unread = f"; your own table cannot be read: {why_not}" if why_not else ""
    if not tables.has_table(device):
        sentence = f"no table says which form of a convolution is fastest on {name}: fastvae tune --vae ... measures it"
        return Finding("forms", NOTE, sentence + unread, facts)
    faster = sum(entry.form is not Form.DIRECT for entry in entries)
    sentence = f"the table of {name} has a faster form for {faster} of its {len(entries)} entries (fastvae tune)"
    return Finding("forms", NOTE if why_not else OK, sentence + unread, facts)


def check_images(seconds: float = 0.5) -> Finding:
    """Measure how many JPEGs of 512 x 512 one thread reads in a second, with the reader of ``fastvae encode``."""
    from PIL import Image, features

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 24, 24, generator=generator, dtype=torch.float32, device="cpu")
    smooth = torch.nn.functional.interpolate(coarse, (512, 512), mode="bicubic", align_corners=False)[0]
    noisy = 255 * smooth + 6 * torch.randn(3, 512, 512, generator=generator, dtype=torch.float32, device="cpu")
    written = io.BytesIO()
    Image.fromarray(noisy.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(written, "JPEG", quality=92)
    jpeg = written.getvalue()
    read_image(jpeg)
    count, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        read_image(jpeg)
        count += 1
    rate = count / taken
    turbo = features.version_feature("libjpeg_turbo")
    facts = {"images_per_second": rate, "side": 512, "bytes": len(jpeg), "libjpeg_turbo": turbo}
    sentence = f"one thread reads {rate:.0f} JPEGs of 512x512 a second"
    if not turbo:
        return Finding("images", NOTE, f"{sentence}, without libjpeg-turbo: the Pillow of PyPI has it", facts)
    return Finding("images", OK, f"{sentence} (libjpeg-turbo {turbo})", facts)
