"""diffusers' image to image before and after ``fastvae.accelerate``: the VAE's share of the time, and the difference.

    python examples/image_to_image.py picture.jpg --model path/to/pipeline --prompt "a watercolour"
    python examples/image_to_image.py --tiny  # random weights, no download

Needs `pip install diffusers`, and for a model with a text encoder `pip install transformers`. On a CPU the
fused kernels do not run; docs/performance.md describes the effect of ``accelerate`` there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastvae

# Any: type checkers do not see its lazy exports, nor that its parts may be None.
diffusers: Any = importlib.import_module("diffusers")


@dataclass
class Run:
    """A picture, uint8 [H, W, 3], and its seconds: in total, and in the VAE."""

    picture: np.ndarray
    seconds: float
    vae_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:.2f} s, {self.vae_seconds:.2f} s of it ({self.vae_seconds / self.seconds:.0%}) in the VAE"
        )


def tiny_pipeline() -> Any:
    """Return Stable Diffusion's image to image with a few hundred thousand random weights and no text encoder."""
    torch.manual_seed(0)
    channels = (32, 64, 64, 64)
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae.eval(), unet=unet.eval(), scheduler=scheduler, requires_safety_checker=False, **parts
    )


@contextlib.contextmanager
def clocked(vae: Any) -> Iterator[Counter]:
    """Count the seconds of ``encode`` and ``decode`` in the block, waiting for the GPU around each call."""
    seconds: Counter[str] = Counter()

    def timed(function):
        def call(*args, **kwargs):
            started = now()
            result = function(*args, **kwargs)
            seconds["vae"] += now() - started  # type: ignore[assignment]
            return result

        return call

    vae.encode, vae.decode = timed(vae.encode), timed(vae.decode)
    try:
        yield seconds
    finally:
        del vae.encode, vae.decode


def now() -> float:
    """Return the time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(pipe: Any, repeat: int, **call: Any) -> Run:
    """Return the fastest of ``repeat`` runs after one to warm up; each starts from the same noise."""
    runs = []
    with clocked(pipe.vae) as seconds:
        for _ in range(repeat + 1):
            seconds.clear()
            started = now()
            picture = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
            runs.append(Run(np.asarray(picture), now() - started, seconds["vae"]))
    return min(runs[1:], key=lambda run: run.seconds)


def before_and_after(pipe: Any, repeat: int, **call: Any) -> tuple[Run, Run]:
    """Run the pipeline unchanged, then with its VAE accelerated; it stays accelerated."""
    stock = fastest(pipe, repeat, **call)
    fastvae.accelerate(pipe)  # the one line
    return stock, fastest(pipe, repeat, **call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", help="the input; default with --tiny: a gradient")
    parser.add_argument("--model", help="a pipeline: a directory or a Hub id")
    parser.add_argument("--tiny", action="store_true", help="random weights")
    parser.add_argument("--prompt", default="a watercolour")
    parser.add_argument("--side", type=int, default=512, help="pixels of the square picture")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the accelerated pipeline's picture")
    arguments = parser.parse_args()
    if arguments.tiny == bool(arguments.model) or (arguments.model and not arguments.picture):
        parser.error("give a picture and --model, or --tiny")

    if arguments.tiny:
        pipe = tiny_pipeline()
        prompt = {"prompt_embeds": torch.randn(1, 4, 16), "guidance_scale": 1.0}
    else:
        half = torch.float16 if torch.cuda.is_available() else torch.float32
        pipe = diffusers.AutoPipelineForImage2Image.from_pretrained(arguments.model, torch_dtype=half)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        prompt = {"prompt": arguments.prompt}
    pipe.set_progress_bar_config(disable=True)
    square = (arguments.side, arguments.side)
    start = (
        Image.open(arguments.picture).convert("RGB") if arguments.picture else Image.linear_gradient("L").convert("RGB")
    )
    call = {**prompt, "image": start.resize(square), "num_inference_steps": arguments.steps, "strength": 0.5}

    stock, fast = before_and_after(pipe, arguments.repeat, **call)
    difference = np.abs(stock.picture.astype(int) - fast.picture)
    print(f"diffusers  {stock}\nfastvae    {fast}")
    print(f"pictures   {(difference > 0).mean():.2%} of the values differ, by {difference.max()} of 255 at most")
    for reason, blocks in Counter(fastvae.explain(pipe).reasons.values()).items():
        print(f"not fused  {blocks} x {reason.name}: {reason.value}")
    if arguments.out:
        Image.fromarray(fast.picture).save(arguments.out)


if __name__ == "__main__":
    main()
