"""Training: losses by hand, a run that learns, a killed run that resumes to the same bits, crops and baselines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastvae
from fastvae.metrics import psnr
from fastvae.training import CropSource, Phase, TrainingPlan, edge_loss, train, vae_loss
from fastvae.training.baselines import LinearBaseline, square, thumbnail_baseline

ROOT = Path(__file__).parents[2]
SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
}


class Gradients:
    """Source of smooth images that depend on the step alone."""

    def batch(self, step, *, batch_size, crop, seed):
        generator = torch.Generator().manual_seed(step)
        corners = torch.rand(batch_size, 3, 2, 2, generator=generator) * 255
        grown = torch.nn.functional.interpolate(corners, size=(crop, crop), mode="bilinear", align_corners=True)
        return grown.to(torch.uint8)


def new_model():
    torch.manual_seed(0)
    return fastvae.AutoencoderKL(**SMALL)


def test_the_loss_has_its_documented_terms():
    image, reconstruction = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    posterior = fastvae.DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))
    squares = ((image - reconstruction) ** 2).mean()
    expected = squares + 0.3 * edge_loss(image, reconstruction) + 0.01 * posterior.kl().sum() / image.numel()
    got = vae_loss(image, reconstruction, posterior, kl_weight=0.01, edge_weight=0.3)
    assert torch.allclose(got, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    with pytest.raises(ValueError, match="image and reconstruction must have one shape"):
        vae_loss(image, reconstruction[:, :, :4], posterior)


def test_edge_loss_counts_edges_and_no_offsets():
    image = torch.zeros(1, 3, 16, 16)
    shifted = image + 0.5
    assert edge_loss(image, shifted) == 0
    stripes = image.clone()
    stripes[..., ::2] = 0.5
    # Every pair of neighbours in a row differs by 0.5, none in a column.
    assert edge_loss(image, stripes, scales=1) == 0.5


def test_a_short_run_learns(tmp_path):
    plan = TrainingPlan([Phase(40, 4, 16), Phase(10, 2, 32)], learning_rate=3e-3, warmup=5, ema_decay=0.9)
    before = new_model()
    images = Gradients().batch(999, batch_size=4, crop=32, seed=0).float() / 127.5 - 1
    trained = train(new_model(), Gradients(), plan, tmp_path, progress=False)
    with torch.no_grad():
        errors = [(vae.eval()(images).sample - images).square().mean().item() for vae in (before, trained)]
    assert errors[1] < 0.5 * errors[0]
    assert not any(p.requires_grad for p in trained.parameters())


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    """A run without a stop, and one that is killed at step 8, after its checkpoint at step 6, have the same weights."""
    plan = TrainingPlan([Phase(8, 2, 16), Phase(4, 1, 32)], warmup=3)
    whole = train(new_model(), Gradients(), plan, tmp_path / "whole", progress=False).state_dict()
    script = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}, {str(Path(__file__).parent)!r}]
from test_training import *
class Stopping(Gradients):
    def batch(self, step, **options):
        if step == 8: os._exit(9)
        return super().batch(step, **options)
torch.use_deterministic_algorithms(True, warn_only=True); torch.set_num_threads(1)
plan = TrainingPlan([Phase(8, 2, 16), Phase(4, 1, 32)], warmup=3)
train(new_model(), Stopping(), plan, {str(tmp_path / "parts")!r}, progress=False, checkpoint_every=6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    resumed = train(new_model(), Gradients(), plan, tmp_path / "parts", progress=False).state_dict()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    with pytest.raises(ValueError, match="another plan; these differ: seed"):
        train(new_model(), Gradients(), TrainingPlan(plan.phases, warmup=3, seed=1), tmp_path / "parts")
    other = fastvae.AutoencoderKL(**{**SMALL, "latent_channels": 3})
    with pytest.raises(ValueError, match="a model of another config"):
        train(other, Gradients(), plan, tmp_path / "parts")
    (tmp_path / "parts" / "training.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"training\.pt is damaged"):
        train(new_model(), Gradients(), plan, tmp_path / "parts")
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        train(new_model(), Gradients(), plan, tmp_path / "new", checkpoint_every=0)
    with pytest.raises(ValueError, match="seed must be from 0"):
        TrainingPlan(plan.phases, seed=2**40)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    vae = new_model()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss at step 0 is nan"):
        train(vae, Gradients(), TrainingPlan([Phase(2, 1, 16)]), tmp_path, progress=False)


def test_the_schedule_rises_and_falls():
    plan = TrainingPlan([Phase(60, 1, 16), Phase(40, 1, 32)], learning_rate=1.0, warmup=10)
    rates = [plan.learning_rate_at(step) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert plan.phase_at(59).crop == 16
    assert plan.phase_at(60).crop == 32
    with pytest.raises(ValueError, match="has 100 steps, there is no step 100"):
        plan.phase_at(100)


def test_crops_depend_on_seed_and_step(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("a.png", (60, 40)), ("b.jpg", (40, 90)), ("small.png", (20, 20))):
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    source = CropSource(tmp_path, short_sides=(32, 40))
    assert source.count == 2
    assert len(source.images) == 4
    batch = source.batch(3, batch_size=5, crop=16, seed=1)
    assert batch.shape == (5, 3, 16, 16)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, CropSource(tmp_path, short_sides=(32, 40)).batch(3, batch_size=5, crop=16, seed=1))
    assert not torch.equal(batch, source.batch(4, batch_size=5, crop=16, seed=1))
    with pytest.raises(ValueError, match="crop must be at most 32, the shortest side of an image, got 33"):
        source.batch(0, batch_size=1, crop=33, seed=1)
    with pytest.raises(ValueError, match="holds no image of 200 pixels"):
        CropSource(tmp_path, short_sides=(200,))
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image"):
        CropSource(tmp_path)
    with pytest.raises(ValueError, match="batch_size of a phase must be at least 1, got 0"):
        Phase(1, 0, 16)


def test_the_baselines():
    """A linear map of few numbers reconstructs an image of flat blocks, and not noise; a thumbnail blurs both."""
    random = np.random.default_rng(1)
    blocks = torch.from_numpy(random.integers(0, 255, (4, 3, 4, 4), dtype=np.uint8))
    flat = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    baseline = LinearBaseline([flat], numbers=3)
    assert torch.equal(baseline(flat[0]), flat[0])
    noise = torch.from_numpy(random.integers(0, 255, (3, 32, 32), dtype=np.uint8))
    assert psnr(noise, baseline(noise)) < 15
    assert psnr(flat[0], thumbnail_baseline(flat[0])) < psnr(flat[0], baseline(flat[0]))
    assert psnr(noise, noise) == float("inf")
    assert abs(psnr(torch.zeros(1, dtype=torch.uint8), torch.full((1,), 255, dtype=torch.uint8))) < 1e-9
    assert square(np.zeros((50, 30, 3), dtype=np.uint8), 16).shape == (3, 16, 16)


def test_the_embedded_model_is_as_good_as_its_card_says():
    """22 dB or more on four photographs that are not in its training set, and the number of its card."""
    data = pytest.importorskip("skimage.data", reason="the held-out photographs come with scikit-image")
    vae = fastvae.AutoencoderKL.from_pretrained("tiny", torch_dtype=torch.float32)
    values = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = square(getattr(data, name)(), 256)
        values.append(psnr(image, vae.decode_latents(vae.encode_latents(image[None], posterior="mode"))[0]))
    mean = sum(values) / 4
    assert mean >= 22.0
    card = (ROOT / "fastvae" / "assets" / "tiny" / "README.md").read_text()
    of_the_card = float(next(line for line in card.splitlines() if line.startswith("| this model")).split("|")[-2])
    assert abs(mean - of_the_card) <= 0.011  # the card has two decimals
    config = json.loads((ROOT / "fastvae" / "assets" / "tiny" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
