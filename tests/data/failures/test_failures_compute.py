"""Failure modes 19 and 21 without a GPU: wrong results of a kernel or a model."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_store import SIDE, small_vae, write_pictures

import fastvae
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.self_check import check_fast_path
from fastvae.fast.cpu import cpu_pass
from fastvae.fast.cpu.cpu_pass import CpuPass
from fastvae.fast.packed_weights import is_channels_last
from fastvae.latents.autoencoder import ACCELERATED

OPTIONS = {"buckets": SIDE, "progress": False, "device": "cpu", "workers": 1}


@pytest.fixture(autouse=True)
def _small_check_pictures():
    """Replace the fixture of that name: here the pictures of the check have their own sizes."""


def means(out) -> dict[str, np.ndarray]:
    return {item["key"]: item["mean"].clone().numpy() for item in LatentDataset(out)}


# Errors that must be found: in half precision more than eight times the rounding error.
SEEN = {"fp32": 1.001, "bf16": 3.0}


@pytest.mark.parametrize("dtype", SEEN)
def test_row_21_a_wrong_kernel_is_noticed_and_torchs_own_layers_run(tmp_path, dtype, monkeypatch, capsys):
    """A convolution of the CPU, one of whose channels is too large: a kernel that is wrong on this device."""
    real = CpuPass._convolve

    def convolve(self, conv, x, *name):
        y = real(self, conv, x, *name)
        y[:, 1] *= SEEN[dtype]
        return y

    monkeypatch.setattr(CpuPass, "_convolve", convolve)
    write_pictures(tmp_path / "in", 3)
    vae = small_vae()
    report = encode(tmp_path / "in", tmp_path / "out", vae=vae, dtype=dtype, **OPTIONS)
    assert report.ok == 3
    assert "the fast path is wrong on this cpu in " in report.notes[-1]
    assert "the fast path is wrong on this cpu" in capsys.readouterr().err
    # The stored rows are those of the model without the fast path.
    found = means(tmp_path / "out")
    stock = MomentEncoder(vae, dtype, torch.device("cpu"))
    fastvae.restore(stock.model)
    fastvae.restore(stock.reference)
    from fastvae.data.images.crop import to_bucket
    from fastvae.data.images.read import read_image

    for key, mean in found.items():
        pixels, _ = to_bucket(read_image(tmp_path / "in" / key, at_least=SIDE), SIDE)
        wanted = stock.moments(pixels[None])[0][0][:4].astype(np.float16)
        assert np.array_equal(mean, wanted)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("widths", [(8, 8, 16, 16), (32, 64, 64, 64)], ids=str)
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 5), marks=pytest.mark.slow)], ids=str)
def test_row_21_a_right_one_passes_within_two_seconds(dtype, widths, seeds):
    for seed in seeds:
        vae = small_vae(seed, block_out_channels=widths, norm_num_groups=4)
        encoder, started = MomentEncoder(vae, dtype, torch.device("cpu")), time.process_time()
        assert check_fast_path(encoder) is None
        assert time.process_time() - started < 2
        assert ACCELERATED in vars(encoder.model)


def torchs_norm(layer, x):
    """The norm of an earlier pass: in channels_last it loses digits of a flat picture."""
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def clamped_norm(layer, x):
    """A norm for values of up to four deviations."""
    y = F.group_norm(x.contiguous(), layer.num_groups, None, None, layer.eps).clamp(-4, 4)
    return y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def norm_of_the_first_strip(layer, x):
    """A norm whose strips are not merged: it takes mean and deviation of the first 2^17 values."""
    groups = x.reshape(x.shape[0], layer.num_groups, -1)
    first = x[:, :, : 2**17 // (x.shape[1] * x.shape[3])].reshape(*groups.shape[:2], -1)
    y = (groups - first.mean(2, True)) * (first.var(2, correction=0, keepdim=True) + layer.eps).rsqrt()
    return y.view(x.shape) * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "dtype", "seen"),
    [(torchs_norm, "fp32", "flat"), (clamped_norm, "bf16", "noisy"), (norm_of_the_first_strip, "fp32", "large")],
)
def test_row_21_a_wrong_norm_that_one_picture_alone_shows_is_noticed(wrong, dtype, seen, monkeypatch):
    """Pictures are judged in the order waves, flat, noisy, large: those before ``seen`` pass."""

    def norm(layer, x, into):
        return F.silu(wrong(layer, x)).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr("fastvae.fast.cpu.cpu_pass.group_norm_silu", norm)
    said = check_fast_path(MomentEncoder(fastvae.AutoencoderKL.from_pretrained("tiny"), dtype, torch.device("cpu")))
    assert said is not None
    assert f"({seen} picture: error " in said


def test_row_21_an_error_as_of_torch_in_channels_last_is_no_wrong_kernel(monkeypatch):
    """On CPUs with AVX512 oneDNN's convolutions in channels_last, which the fast path takes, err more than in NCHW."""
    convolve, norm = torch.nn.Conv2d._conv_forward, cpu_pass.group_norm_silu

    def inaccurate(self, x, weight, bias):
        y = convolve(self, x, weight, bias)
        return y * (1 + 1e-4) if is_channels_last(x) else y

    monkeypatch.setattr(cpu_pass, "group_norm_silu", lambda layer, x, into: norm(layer, x, into).mul_(1 + 1e-4))
    encoder = MomentEncoder(small_vae(), "fp32", torch.device("cpu"))
    assert check_fast_path(encoder) is not None, "the error is seen where torch has none"
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", inaccurate)
    assert check_fast_path(MomentEncoder(small_vae(), "fp32", torch.device("cpu"))) is None


def test_row_21_a_model_that_overflows_is_no_wrong_kernel():
    """Rows are checked for infinities one by one."""
    vae = small_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1e38
    assert check_fast_path(MomentEncoder(vae, "bf16", torch.device("cpu"))) is None


def test_row_19_no_row_on_disk_is_other_than_finite(tmp_path):
    """A model that gives infinities for some images in every dtype: those are failures, the others are rows."""
    from support.store_checks import committed, failures

    names = write_pictures(tmp_path / "in", 6)
    vae = small_vae()

    def spoilt(module, args, output):
        bad = args[0].float().mean((1, 2, 3)) > 0
        return torch.where(bad[:, None, None, None], torch.full_like(output, float("inf")), output)

    vae.encoder.conv_in.register_forward_hook(spoilt)
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        report = encode(tmp_path / "in", out, vae=vae, dtype=dtype, max_failures="100%", **OPTIONS)
        assert 0 < report.failed < 6
        assert set(failures(out).values()) == {"non_finite"}
        rows = {key for key, _ in committed(out)}  # checks every value
        assert rows | failures(out).keys() == set(names)
        assert not rows & failures(out).keys()
