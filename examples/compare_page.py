"""A page that sends a picture through a VAE and back, once as torch runs it and once accelerated, and shows the error.

    python examples/compare_page.py --vae path/to/vae

Needs Gradio (``pip install "fastvae[page]"``). The page fetches nothing: its fonts are the browser's own.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import dataclass

# Read when gradio is imported; without it a page that nobody asked to would report home.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from torch import Tensor

import fastvae
from fastvae.metrics import psnr

# What a difference of one in 255 is multiplied by, so that it can be seen.
GAIN = 32


@dataclass
class Trip:
    """A picture's way through latents and back: uint8 [H, W, 3], and milliseconds."""

    picture: np.ndarray
    encode: float
    decode: float


def accelerated_copy(vae: fastvae.AutoencoderKL) -> fastvae.AutoencoderKL:
    """A copy that runs on the fast path, its own weights in place."""
    return fastvae.accelerate(copy.deepcopy(vae))


def cropped(vae: fastvae.AutoencoderKL, picture: np.ndarray) -> Tensor:
    """uint8 [1, 3, H, W], with sides that the model takes; Gradio hands pictures on as uint8 [H, W, 3]."""
    f = vae.downsample_factor
    height, width = (side // f * f for side in picture.shape[:2])
    if not height or not width:
        raise gr.Error(f"a picture must be at least {f} x {f} pixels, got {picture.shape[1]} x {picture.shape[0]}")
    return torch.from_numpy(picture[:height, :width].copy()).permute(2, 0, 1)[None]


@torch.no_grad()
def round_trip(vae: fastvae.AutoencoderKL, picture: Tensor) -> Trip:
    """The mode's latents and the picture of them; both wait for the GPU by handing values out."""
    started = time.perf_counter()
    latents = vae.encode_latents(picture, posterior="mode")
    latents.sum().item()
    encoded = time.perf_counter()
    back = vae.decode_latents(latents)
    assert isinstance(back, Tensor)  # and not PIL images, which output="pil" would give
    pixels = back[0].permute(1, 2, 0).cpu().numpy()
    done = time.perf_counter()
    return Trip(pixels, 1e3 * (encoded - started), 1e3 * (done - encoded))


def report(picture: Tensor, eager: Trip, fast: Trip) -> str:
    """The figures of both ways as a table in Markdown."""
    original = picture[0].permute(1, 2, 0).numpy()
    rows = [f"| {name} | {trip.encode:.0f} | {trip.decode:.0f} | {psnr(original, trip.picture):.2f} |" for name, trip in
            (("eager", eager), ("fastvae", fast))]  # fmt: skip
    apart = np.abs(eager.picture.astype(int) - fast.picture)
    return "\n".join(
        [
            "| | encode, ms | decode, ms | PSNR to the original, dB |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Between the two: {psnr(eager.picture, fast.picture):.1f} dB; "
            f"{(apart > 0).mean():.2%} of the values differ, by {apart.max()} of 255 at most.",
        ]
    )


def build(vae: fastvae.AutoencoderKL) -> gr.Blocks:
    """The page for a model."""
    fast = accelerated_copy(vae)

    def compare(picture: np.ndarray | None):
        if picture is None:
            raise gr.Error("choose a picture first")
        pixels = cropped(vae, picture)
        one, other = round_trip(vae, pixels), round_trip(fast, pixels)
        error = np.abs(one.picture.astype(int) - other.picture) * GAIN
        return one.picture, other.picture, error.clip(0, 255).astype(np.uint8), report(pixels, one, other)

    with gr.Blocks(title="fastvae: there and back") as page:
        gr.Markdown("# There and back\nThe same weights, as torch runs them and as fastvae does.")
        with gr.Row():
            given = gr.Image(label="picture", type="numpy", image_mode="RGB")
            eager = gr.Image(label="eager", format="png")
            accelerated = gr.Image(label="fastvae", format="png")
            difference = gr.Image(label=f"difference, times {GAIN}", format="png")
        figures = gr.Markdown()
        start = gr.Button("Send it through", variant="primary", elem_id="start")
        start.click(compare, given, [eager, accelerated, difference, figures])
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="tiny", help="a directory, a Hub id, or the embedded 'tiny'")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = fastvae.AutoencoderKL.from_pretrained(arguments.vae, torch_dtype=torch.float32, device=device)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(vae).launch(server_port=arguments.port, theme=plain)


if __name__ == "__main__":
    main()
