"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fastvae.cli.output import Count

Command = Callable[..., Any]


def combined(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine several options into one decorator, in the order in which help lists them."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _named(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    if value is None:
        raise click.UsageError(f"--vae must name the model: {_MODELS}")
    return value


_MODELS = 'a directory, a Hub id, a single file, or "tiny", a small model of this package for trying things out.'
# Required, because no diffusion model knows the latents of a default.
vae = click.option("--vae", callback=_named, help="Required. " + _MODELS[0].upper() + _MODELS[1:])
model_location = combined(
    click.option("--subfolder", help="Folder of the VAE inside that directory or repository."),
    click.option("--revision", help="A branch, tag or commit of the Hub repository."),
)
dtype = click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default: what suits the device.")
preset = click.option("--preset", help="The known model of a single file, if its tensors do not decide the scaling.")
device = click.option("--device", help="A torch device: cpu, cuda, cuda:1. Default: the first GPU, else the CPU.")
run = combined(
    click.option(
        "--deterministic", is_flag=True, help="Encode image by image, so that neither batch nor workers change a bit."
    ),
    click.option("--batch", default="auto", show_default=True, help="Images per step."),
    click.option("--workers", default="auto", show_default=True, help="Threads that read images."),
    click.option(
        "--max-failures",
        default="5 or 0.1%",
        show_default=True,
        help="Share or count of failures above which the exit code is 3; by default the greater.",
    ),
    click.option(
        "--max-pixels",
        type=Count(),
        default="178M",
        show_default=True,
        help="Refuse larger images before they are decoded.",
    ),
)
source = combined(
    click.option(
        "--image-column",
        help="Image column of a Parquet file or manifest (default: image); extension of the image in a tar sample.",
    ),
    click.option(
        "--key-column",
        help="Key column of a Parquet file or manifest. Default: key; in a Parquet file without it the image's path.",
    ),
    click.option("--scheme", "schemes", multiple=True, help="URL scheme that a manifest may name, such as https."),
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Print no plan and no progress bar.")
