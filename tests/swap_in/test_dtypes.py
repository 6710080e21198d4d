"""Weights that change dtype, device or layout: in every form of the call, within one call, in part, and back.

Every call is held to stock in the same state, and to the path that this state allows.
"""

import copy
import functools

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from support.accuracy import assert_as_accurate, assert_as_accurate_as_one_of
from support.short_run import short_run
from swap_in.stock import (
    Walks,
    assert_computes_like,
    assert_same_bits,
    both_ways,
    fast_and_stock,
    latents,
    moments_of,
    pixels,
    tiny,
)

import fastvae
from fastvae.fast.cpu.group_norm import in_both_layouts
from fastvae.fast.fallback_reasons import Reason

pytestmark = pytest.mark.usefixtures("users_cpu")

WALKED = ["Encoder", "Decoder"]


# Each function receives a model and returns the result of the call.
WAYS = {
    "to(dtype)": lambda vae: vae.to(torch.bfloat16),
    "to(dtype=)": lambda vae: vae.to(dtype=torch.float16),
    "to(device, dtype)": lambda vae: vae.to("cpu", torch.bfloat16),
    "to(device=, dtype=)": lambda vae: vae.to(device=torch.device("cpu"), dtype=torch.float16),
    "to(device)": lambda vae: vae.to("cpu"),
    "to(like a tensor)": lambda vae: vae.to(torch.empty(0, dtype=torch.bfloat16)),
    "to(non_blocking=)": lambda vae: vae.to(torch.float16, non_blocking=True),
    "to(memory_format=)": lambda vae: vae.to(memory_format=torch.channels_last),
    "to(dtype=, memory_format=)": lambda vae: vae.to(dtype=torch.bfloat16, memory_format=torch.channels_last),
    "half": lambda vae: vae.half(),
    "bfloat16": lambda vae: vae.bfloat16(),
    "half and float": lambda vae: vae.half().float(),
    "bfloat16 and to(float32)": lambda vae: vae.bfloat16().to(torch.float32),
    "cpu": lambda vae: vae.cpu(),
    "train": lambda vae: vae.train(),
    "train and eval": lambda vae: vae.train().eval(),
    "requires_grad_": lambda vae: vae.requires_grad_(False),
}


# Every form on diffusers' class; in the short run one of each kind on ours instead.
ON_OURS = ("to(dtype)", "to(memory_format=)", "half and float", "train")


@pytest.mark.parametrize(
    ("way", "library"),
    short_run(
        [(way, library) for library in ("diffusers", "fastvae") for way in WAYS],
        [(way, "fastvae" if way in ON_OURS else "diffusers") for way in WAYS],
    ),
)
def test_every_form_of_moving_and_recasting(way, library, monkeypatch):
    vae, stock = fast_and_stock(library)
    moved = WAYS[way](vae)
    assert moved is vae
    WAYS[way](stock)
    assert (vae.dtype, vae.device, vae.training) == (stock.dtype, stock.device, stock.training)
    walks = Walks(monkeypatch)
    assert_computes_like(vae, stock, stock.dtype)
    assert walks.taken() == WALKED
    for name, weight in vae.state_dict().items():
        other = stock.state_dict()[name]
        assert torch.equal(weight, other)
        assert (weight.dtype, weight.stride()) == (other.dtype, other.stride())
    assert_same_bits(fastvae.restore(vae), stock, stock.dtype)


@pytest.mark.parametrize("library", short_run(["diffusers", "fastvae"], ["diffusers"]))
def test_double_runs_the_modules(library, monkeypatch):
    vae, stock = fast_and_stock(library)
    walks = Walks(monkeypatch)
    assert_same_bits(vae.double(), stock.double(), torch.float64)
    assert not walks.taken()
    assert_computes_like(vae.float(), stock.float())
    assert walks.taken() == WALKED


@pytest.mark.parametrize(
    ("library", "freeze"),
    short_run(
        [(library, freeze) for library in ("diffusers", "fastvae") for freeze in (False, True)],
        [("diffusers", True), ("fastvae", False)],
    ),
)
def test_sdxls_ping_pong_within_one_call(library, freeze, monkeypatch):
    """Half precision, and fp32 for the decode with force_upcast; twice, and the weights keep their values."""
    vae, stock = tiny(library, force_upcast=True).half(), tiny(library, force_upcast=True).half()
    fastvae.accelerate(vae, freeze=freeze)
    z, walks, images = latents(dtype=torch.float16), Walks(monkeypatch), []
    for _ in range(2):
        assert vae.dtype == torch.float16
        assert vae.config.force_upcast
        vae.to(torch.float32)
        upcast = z.to(next(iter(vae.post_quant_conv.parameters())).dtype)
        assert upcast.dtype == torch.float32
        images.append(vae.decode(upcast, return_dict=False)[0])
        assert_computes_like(vae, copy.deepcopy(stock).float())
        vae.to(dtype=torch.float16)
        assert_computes_like(vae, stock, torch.float16)
    assert walks.taken() == ["Decoder", *WALKED, *WALKED] * 2
    assert torch.equal(*images)
    assert_same_bits(fastvae.restore(vae), stock, torch.float16)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused projections"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_animatediffs_casts_of_some_layers(dtype, fused, monkeypatch):
    """AnimateDiff's SDXL pipeline upcasts only some layers: with mixed dtypes the part runs as stock does."""
    vae, stock = fast_and_stock()
    models = [vae, stock]
    for model in models:
        if fused:
            model.fuse_qkv_projections()
            model.requires_grad_(False)  # the fused layer is made anew, and learns
        model.to(dtype)
        model.to(dtype=torch.float32)
        processors = AttnProcessor2_0, FusedAttnProcessor2_0
        assert isinstance(model.decoder.mid_block.attentions[0].processor, processors)
        for module in (model.post_quant_conv, model.decoder.conv_in, model.decoder.mid_block):
            module.to(dtype)
    assert fastvae.explain(vae, (1, 3, 16, 16)).reasons["decoder"] is Reason.MIXED_DTYPES
    walks = Walks(monkeypatch)
    assert outcome(vae, latents(dtype=dtype)) == outcome(stock, latents(dtype=dtype))
    assert torch.equal(*(moments_of(model, pixels()) for model in (fastvae.restore(vae), stock)))
    fastvae.accelerate(vae)
    for model in models:
        model.to(dtype)
    assert_computes_like(vae, stock, dtype)
    assert walks.taken() == WALKED


def outcome(vae, z):
    """Return the image, or the text of the error."""
    try:
        return vae.decode(z).sample.tolist()
    except RuntimeError as refusal:
        return str(refusal)


def test_a_decoder_in_two_dtypes_that_fit_is_walked_around_them(monkeypatch):
    """Hooks cast where the dtype changes: that block runs as a module."""
    stock, vae, exact = tiny(), fastvae.accelerate(tiny()), tiny().double()
    for model in (stock, vae):
        model.decoder.mid_block.to(torch.bfloat16)
        model.decoder.mid_block.register_forward_pre_hook(lambda _, given: tuple(x.bfloat16() for x in given[:1]))
        model.decoder.mid_block.register_forward_hook(lambda *given: given[2].float())
    z, walks = latents(), Walks(monkeypatch)
    assert_as_accurate(vae.decode(z).sample, stock.decode(z).sample, exact.decode(z.double()).sample)
    assert walks.taken() == ["Decoder"]


ON_DISK = {"encoder": "disk", "decoder": "cpu", "quant_conv": "cpu", "post_quant_conv": "cpu"}


@pytest.mark.parametrize("places", [{"": "cpu"}, ON_DISK], ids=["one place", "the encoder on disk"])
def test_loaded_by_a_device_map(places, tmp_path, monkeypatch):
    """Hooks on every layer read weights from disk; these layers run as modules."""
    tiny().save_pretrained(tmp_path)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "away")
    fastvae.accelerate(vae.requires_grad_(False))
    walks = Walks(monkeypatch)
    if places is ON_DISK:
        assert vae.encoder.conv_in.weight.device.type == "meta"
        assert_same_bits(vae, tiny())
        assert not walks.taken()
    else:
        assert_computes_like(vae, tiny())
        assert walks.taken() == WALKED
    assert_same_bits(fastvae.restore(vae), tiny())


def test_requires_grad_back_and_forth(monkeypatch):
    """Fine-tuning of the decoder only, as VAE trainers do: gradients exist for its weights and for no others."""
    vae, stock = fast_and_stock()
    exact, walks = copy.deepcopy(stock).double(), Walks(monkeypatch)

    def gradient_of(model, x):
        model.zero_grad()
        model.decoder.requires_grad_(True)
        (model(x).sample - x).square().mean().backward()
        assert all(weight.grad is None for weight in (*model.encoder.parameters(), *model.quant_conv.parameters()))
        return torch.cat([weight.grad.flatten() for weight in model.decoder.parameters()])

    ours = gradient_of(vae, pixels())
    assert walks.taken() == ["Encoder"]
    eager = in_both_layouts(functools.partial(gradient_of, stock), pixels())
    assert_as_accurate_as_one_of(ours, eager, gradient_of(exact, pixels(dtype=torch.float64)))
    assert not walks.taken()
    for model in (vae, stock):
        model.requires_grad_(False)
    assert not moments_of(vae, pixels()).requires_grad
    assert_computes_like(vae, stock)
    assert walks.taken() == [*WALKED[:1], *WALKED]


def test_the_fused_kernels_take_the_ping_pong(monkeypatch):
    """In the interpreter: packed weights of one dtype are not used for another."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", KERNEL_DEVICES)
    small = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",)}
    small |= {"up_block_types": ("UpDecoderBlock2D",), "mid_block_add_attention": False}
    vae, stock = fastvae.accelerate(tiny(**small).half(), freeze=True), tiny(**small).half()
    for dtype in (torch.float16, torch.float32, torch.float16):
        vae.to(dtype)
        assert_computes_like(vae, copy.deepcopy(stock).to(dtype), dtype, size=4)
    assert fastvae.fast_report(vae)["rows"] == 6
    assert both_ways(vae, torch.float16, size=4)[0].dtype == torch.float16
