"""Input, result and settings of an accelerated model, for tests of what accelerate does to it."""

import torch


def pixels(batch=1, side=8):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(vae, x):
    return vae.encode(x).latent_dist.parameters


def settings(vae):
    """Return the settings of the path that the model and its parts share, or None for a stock model."""
    paths = {id(path): path for module in (vae, vae.encoder, vae.decoder) if (path := vars(module).get("_fastvae"))}
    forwards = {getattr(module, "forward").__module__ for module in (vae.encoder, vae.decoder)}  # noqa: B009
    assert len(paths) <= 1
    assert forwards == {"fastvae.fast.accelerate"} if paths else "fastvae.fast.accelerate" not in forwards
    path = next(iter(paths.values()), None)
    return path and (path.precision, path.deterministic, path.packed.frozen)
