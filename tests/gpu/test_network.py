"""The accelerated network on a GPU: as accurate as eager, the same bits from graphs and row by row, real gradients."""

import copy

import pytest
import torch
from gpu.gpu_models import model, pictures
from support.accuracy import assert_as_accurate

import fastvae
from fastvae.latents.pixels import normalized

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def worse(one, other, truth):
    """Return the one of two results that is further from the truth."""
    return max(one, other, key=lambda result: (result.double() - truth).square().mean().item())


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def eager(vae, part, x):
    return vae.encode(x).latent_dist.parameters if part == "encode" else vae.decode(x).sample


def given(part, device, dtype, count=3, height=72, width=56):
    if part == "encode":
        return normalized(pictures(count, height, width)).to(device, dtype)
    return torch.randn(count, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(3)).to(device, dtype)


@pytest.mark.parametrize("settings", [{}, {"freeze": True}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["encode", "decode"])
@torch.no_grad()
def test_the_network_is_as_accurate_as_eager(part, dtype, settings, card):
    vae = model(card, dtype)
    x = given(part, card, dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth = eager(copy.deepcopy(vae).double(), part, x.double())
        stock = worse(eager(vae, part, x), eager(channels_last(copy.deepcopy(vae)), part, channels_last(x)), truth)
        fastvae.accelerate(vae, **settings)
        ours = eager(vae, part, x)
    assert ours.is_contiguous()
    assert_as_accurate(ours, stock, truth)
    assert fastvae.fast_report(vae)["rows"] == len(x), "nothing fell back"


@pytest.mark.parametrize("part", ["encode", "decode"])
@torch.no_grad()
def test_a_row_in_a_batch_has_its_bits_alone(part, card):
    vae = fastvae.accelerate(model(card, torch.bfloat16), deterministic=True)
    x = given(part, card, torch.bfloat16, count=5)
    whole = eager(vae, part, x)
    for i in range(len(x)):
        assert torch.equal(eager(vae, part, x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("part", ["encode", "decode"])
@torch.no_grad()
def test_graphs_give_the_bits_of_the_calls_that_they_replay(part, freeze, card):
    plain = fastvae.accelerate(model(card, torch.bfloat16), freeze=freeze)
    replayed = fastvae.accelerate(model(card, torch.bfloat16), freeze=freeze, graphs=True)
    inputs = [given(part, card, torch.bfloat16, height=height) for height in (72, 48, 72, 48, 72)]
    inputs = [x + 0.01 * i for i, x in enumerate(inputs)]
    kept = [(eager(replayed, part, x), eager(plain, part, x)) for x in inputs for _ in range(2)]
    for mine, theirs in kept:  # compared at the end: no replay may overwrite an earlier result
        assert torch.equal(mine, theirs)
    report = fastvae.fast_report(replayed)
    assert report["graphs"] == 2
    assert report["graph_replays"] >= 6, report
    if freeze:
        return
    for vae in (plain, replayed):
        for weight in vae.parameters():
            weight.mul_(1.25)
    assert torch.equal(eager(replayed, part, inputs[0]), eager(plain, part, inputs[0])), "weights may change in place"


@torch.no_grad()
def test_pixels_in_any_layout_are_as_accurate_as_eager(card):
    """uint8 NCHW and NHWC and floats: each has a kernel, whose sums may have another order."""
    base = model(card, torch.float16)
    images = pictures(4, 64, 64, card)
    x = normalized(images).half()
    stock, truth = base.encode_moments(x), copy.deepcopy(base).double().encode_moments(x.double())
    scale = base.scaling_factor
    stock, truth = (moments.chunk(2, dim=1)[0] * scale for moments in (stock, truth))
    fastvae.accelerate(base)
    for given in (images, images.permute(0, 2, 3, 1).contiguous(), x):
        latents = fastvae.encode_latents(base, given, posterior="mode")
        assert latents.device == card
        assert_as_accurate(latents.half(), stock.half(), truth)


@torch.no_grad()
def test_seeds_draw_the_noise_that_a_cpu_draws(card):
    """To 1e-5 of a normal, times the deviation: fast sines differ from libm's."""
    vae = model(card)
    moments = vae.encode_moments(normalized(pictures(2, 64, 64, card)))
    ours = fastvae.sample_posterior(moments, seeds=[5, 6])
    theirs = fastvae.sample_posterior(moments.cpu(), seeds=[5, 6])
    deviation = moments.chunk(2, dim=1)[1].clamp(-30, 20).mul(0.5).exp().max().item()
    largest = ours.abs().max().item()
    assert (ours.cpu() - theirs).abs().max().item() <= 1e-5 * deviation + 2 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_eagers(dtype, card):
    """Gradients of all weights and the input together, each divided by its own size."""
    x = given("encode", card, dtype, count=2)

    def gradients(vae, kind, form):
        vae = vae.to(kind).requires_grad_(True)
        leaf = form(x.to(kind)).requires_grad_(True)
        out = eager(vae, "encode", leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
        found = torch.autograd.grad((out * weight).sum(), [leaf, *vae.parameters()], allow_unused=True)
        return [None if value is None else value.double() for value in found]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        base = model(card, dtype)
        truth = gradients(copy.deepcopy(base), torch.float64, torch.clone)
        stock = gradients(channels_last(copy.deepcopy(base)), dtype, channels_last)
        ours = gradients(fastvae.accelerate(copy.deepcopy(base)), dtype, torch.clone)
    sizes = [None if true is None else true.square().mean().sqrt().clamp_min(1e-12) for true in truth]

    def together(values):
        assert [value is None for value in values] == [size is None for size in sizes]
        parts = [(v / s).flatten() for v, s in zip(values, sizes, strict=True) if v is not None]
        return torch.cat(parts)

    assert_as_accurate(together(ours).to(dtype), together(stock).to(dtype), together(truth))


@torch.no_grad()
def test_an_overflow_of_fp16_is_computed_again(card):
    """Weights that make the stream 2^18 times larger: eager fp16 is not finite, latents are."""
    vae = model(card, torch.float16)
    vae.encoder.conv_in.weight.mul_(2.0**18)
    images = pictures(2, 64, 64, card)
    stock = vae.encode_moments(normalized(images).half())
    fastvae.accelerate(vae)
    latents = fastvae.encode_latents(vae, images, seeds=[1, 2])
    assert not torch.isfinite(stock).all(), "the case shows nothing: eager is finite"
    assert torch.isfinite(latents).all()


@torch.no_grad()
def test_no_block_falls_back(card):
    vae = fastvae.accelerate(model(card, torch.bfloat16))
    text = str(fastvae.explain(vae, (1, 3, 64, 64)))
    assert "no fused kernel runs on this device" not in text
    assert "fused" in text
