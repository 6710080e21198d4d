"""Every reason to fall back: explain names exactly the blocks that do, as data and text, and results are correct.

A block that falls back runs between fused ones and is compared with float64; a whole encoder or decoder that falls
back has eager's bits. Hooks are called as often as in eager.
"""

import copy
import functools

import accelerate.hooks
import pytest
import torch
from fast.fallback_cases import (
    ATTENTION,
    BLOCKS,
    BOTH,
    SHAPE,
    WHOLES,
    an_input,
    every,
    offloaded,
    offloaded_by_group,
    stored_in_fp8,
    tiny,
)
from fast.small_models import LIBRARIES, ONE_BLOCK
from fastvae_kernels.shared.runtime import INTERPRETED
from support.accuracy import assert_as_accurate
from support.listening_hooks import Listening
from support.short_run import short_run
from torch import nn
from torch.autograd import forward_ad

import fastvae
from fastvae.fast import fallback_reasons
from fastvae.fast.fallback_reasons import Reason

# Each kind of block, hook and forward as a module between fused blocks.
COMPUTED = [
    "forward hook on a down block", "pre-hook on a downsampler", "adapters that learn", "custom processor",
    "dilated convolution",
]  # fmt: skip


# Others of the same kind, with another layer or library.
ALIKE = [
    "forward hook on a residual block", "pre-hook on an upsampler's convolution", "foreign residual block",
    "custom processor, diffusers", "forward hook on an up block",
]  # fmt: skip


# The test below asks explain about those that are computed.
@pytest.mark.parametrize("name", short_run(BLOCKS, BLOCKS.keys() - {*COMPUTED, *ALIKE}))
def test_explain_names_the_blocks_that_fall_back(name):
    case, heard = BLOCKS[name], []
    told = fastvae.explain(fastvae.accelerate(case.model(heard)), SHAPE)
    assert told.reasons == dict.fromkeys(case.names, case.reason)
    other = "differentiable" if name.endswith("learn") else "fused"
    assert {row.path for row in told.rows} == {"module", other}
    lines = str(told).splitlines()
    for block in case.names:
        (line,) = (line for line in lines if line.startswith(f"{block} "))
        assert line.endswith(f"{case.reason.name}: {case.reason.value}")
    assert not heard, "explain runs nothing"
    assert sum("module" in line.split() for line in lines) == len(case.names)


@pytest.mark.parametrize("name", short_run(BLOCKS, COMPUTED))
def test_a_block_falls_back_and_the_rest_stays_fused(name, monkeypatch):
    case, heard, heard_by_eager = BLOCKS[name], [], []
    part = max(case.names).split(".")[0]
    # In channels_last as our convolutions: on a CPU the rounding depends on the layout.
    vae, eager = case.model(heard), case.model(heard_by_eager).to(memory_format=torch.channels_last)
    truth = case.model([]).double()
    told = fastvae.explain(fastvae.accelerate(vae), SHAPE)
    assert told.reasons == dict.fromkeys(case.names, case.reason)
    launches = _launches(monkeypatch)
    x = an_input(part)
    ours, plain = getattr(vae, part)(x), getattr(eager, part)(x.contiguous(memory_format=torch.channels_last))
    assert_as_accurate(ours.detach(), plain.detach(), getattr(truth, part)(x.double()).detach())
    assert len(heard) == len(heard_by_eager)
    if INTERPRETED:
        assert len(launches) == sum(n for op, n in told.launches[part].items() if op.startswith("fastvae::"))


def _launches(monkeypatch):
    """Return a list to which each kernel launch of the interpreter appends."""
    from triton.runtime import interpreter

    launches, call = [], interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        launches.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return launches


@pytest.mark.parametrize("act_fn", short_run(["relu", "mish"], ["relu"]))
def test_no_other_activation_is_taken_for_silu(act_fn):
    told = fastvae.explain(fastvae.accelerate(tiny(act_fn=act_fn)), SHAPE)
    assert set(told.reasons.values()) == {Reason.UNSUPPORTED_LAYER}
    assert set(told.reasons) == every("encoder", "resnets") | every("decoder", "resnets")


@pytest.mark.parametrize("name", WHOLES)
def test_a_part_that_falls_back_gives_the_bits_of_eager(name):
    case, heard, heard_by_eager = WHOLES[name], [], []
    vae, eager = case.model(heard), case.model(heard_by_eager)
    fastvae.accelerate(vae, precision="exact" if case.reason is Reason.EXACT else "fast")
    told = fastvae.explain(vae, SHAPE)
    assert told.reasons == dict.fromkeys(case.names, case.reason)
    for part in case.names:
        assert f"{part} " in str(told)
        assert f"{case.reason.name}: {case.reason.value}" in str(told)
        assert not told.launches[part]
        x = an_input(part)
        if case.reason is Reason.META:
            assert getattr(vae, part)(x.to("meta")).shape == getattr(eager, part)(x.to("meta")).shape
            continue
        x = x.to(torch.float64 if case.reason is Reason.DTYPE else x.dtype)
        with torch.no_grad():
            assert torch.equal(getattr(vae, part)(x), getattr(eager, part)(x))
    assert len(heard) == len(heard_by_eager)


@pytest.mark.parametrize("change", [offloaded, offloaded_by_group, stored_in_fp8])
def test_latents_in_one_call_come_of_models_stored_elsewhere(change):
    vae, x = tiny("diffusers"), an_input("encoder")
    change(vae, [])
    expected = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
    stock = fastvae.encode_latents(vae, x, posterior="mode")
    assert torch.equal(stock, expected)
    assert torch.equal(fastvae.encode_latents(fastvae.accelerate(vae), x, posterior="mode"), expected)
    assert fastvae.decode_latents(vae, stock).shape == x.shape


def test_a_hook_on_every_module_is_heard():
    vae, calls, called = fastvae.accelerate(tiny()), [], []
    count = sum(1 for _ in tiny().encoder.modules())
    for kind in ("forward_hook", "forward_pre_hook"):
        handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: calls.append(1))
        try:
            assert fastvae.explain(vae, SHAPE).reasons == dict.fromkeys(BOTH, Reason.HOOKS)
            vae.encoder(an_input("encoder"))
            called.append(len(calls))
        finally:
            handle.remove()
    assert 20 < called[0] <= count
    assert called[1] == 2 * called[0]


def test_without_a_gpu_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(fallback_reasons, "KERNEL_DEVICES", ("cuda",))
    vae = fastvae.accelerate(tiny("diffusers"))
    assert fastvae.explain(vae, SHAPE).reasons == dict.fromkeys(BOTH, Reason.CPU)
    vae.encoder(an_input("encoder"))
    assert fastvae.fast_report(vae)["rows"] == 0


def test_autocast_is_left_to_the_layers():
    vae, eager, x = fastvae.accelerate(tiny()), tiny(), an_input("decoder")
    with torch.autocast("cpu", torch.bfloat16):
        assert fastvae.explain(vae, SHAPE).reasons == dict.fromkeys(BOTH, Reason.AUTOCAST)
        ours, plain = vae.decoder(x), eager.decoder(x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    assert not fastvae.explain(vae, SHAPE).reasons


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode
def test_gradients_in_forward_mode_are_not_lost():
    """The fused ops have no forward mode; without the check the tangent would be lost silently."""
    config = {"mid_block_add_attention": False}  # torch's own attention has no forward mode on a CPU
    vae, eager, x = fastvae.accelerate(tiny(**config)), tiny(**config), an_input("encoder")
    tangents = []
    with forward_ad.dual_level():
        assert fastvae.explain(vae, SHAPE).reasons == dict.fromkeys(BOTH, Reason.GRADIENT)
        for model in (vae, eager):
            tangents.append(forward_ad.unpack_dual(model.encoder(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    assert torch.equal(*tangents)
    assert torch.equal(*(torch.func.grad(lambda z, m=m: m.decoder(z).sum())(an_input("decoder")) for m in (vae, eager)))
    assert not fastvae.explain(vae, SHAPE).reasons


@pytest.mark.parametrize("library", short_run(LIBRARIES, ["diffusers"]))
def test_quant_conv_is_not_folded_where_it_learns_or_somebody_listens(library):
    vae, eager, x = fastvae.accelerate(tiny(library, **ONE_BLOCK)), tiny(library, **ONE_BLOCK), an_input("encoder")
    plain = eager.encode(x).latent_dist.parameters
    vae.quant_conv.requires_grad_(True)
    assert fallback_reasons.why_not_quant_conv(vae) is Reason.GRADIENT
    moments = fastvae.latents.convert.encode_moments(vae, x)
    assert torch.autograd.grad(moments.sum(), vae.quant_conv.bias)[0].abs().min() > 0
    vae.quant_conv.requires_grad_(False)
    assert fallback_reasons.why_not_quant_conv(vae) is None

    calls = []
    handle = vae.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    assert fallback_reasons.why_not_quant_conv(vae) is Reason.HOOKS
    fastvae.encode_latents(vae, x)
    assert calls == ["encoder"]
    handle.remove()

    class Doubling(type(vae)):
        def encode(self, x):
            return super().encode(2 * x)

    vae.__class__ = Doubling
    assert fallback_reasons.why_not_quant_conv(vae) is Reason.FOREIGN_FORWARD
    doubled = eager.encode(2 * x).latent_dist.parameters
    torch.testing.assert_close(fastvae.latents.convert.encode_moments(vae, x), doubled)
    assert not torch.allclose(doubled, plain)


def test_an_offload_hook_on_the_whole_model_is_heard():
    """diffusers' model offload: encode and decode call it, and encode_latents too."""
    vae, calls = tiny("diffusers", **ONE_BLOCK), []
    accelerate.hooks.add_hook_to_module(vae, Listening(calls))
    fastvae.accelerate(vae)
    assert not fastvae.explain(vae, SHAPE).reasons
    vae.encode(an_input("encoder"))
    fastvae.encode_latents(vae, an_input("encoder"))
    assert calls == [vae, vae]


@pytest.mark.parametrize("library", short_run(LIBRARIES, ["diffusers"]))
def test_fused_projections_stay_fast_and_right(library):
    vae, x = tiny(library), an_input("encoder")
    eager, truth = (copy.deepcopy(vae).to(memory_format=torch.channels_last), copy.deepcopy(vae).double())
    fastvae.accelerate(vae).fuse_qkv_projections()
    assert type(vae.get_submodule(ATTENTION).processor).__name__ == "FusedAttnProcessor2_0"
    assert not fastvae.explain(vae, SHAPE).reasons
    plain = eager.encoder(x.contiguous(memory_format=torch.channels_last))
    assert_as_accurate(vae.encoder(x), plain, truth.encoder(x.double()))
    vae.unfuse_qkv_projections()
    assert not fastvae.explain(vae, SHAPE).reasons
    assert_as_accurate(vae.encoder(x), plain, truth.encoder(x.double()))


def test_built_in_processors_are_fast():
    from diffusers.models import attention_processor

    vae = fastvae.accelerate(tiny("diffusers"))
    for processor in (attention_processor.AttnProcessor(), attention_processor.AttnProcessor2_0()):
        vae.set_attn_processor(processor)
        assert not fastvae.explain(vae, SHAPE).reasons


def test_what_eager_refuses_is_refused():
    """Dtypes of a block, an input or a model that do not fit: eager's error, and explain names the reason."""
    vae, x = tiny("diffusers").to(torch.bfloat16), an_input("decoder").to(torch.bfloat16)
    vae.decoder.mid_block.to(torch.float32)
    fastvae.accelerate(vae)
    names = {f"decoder.mid_block.{name}" for name in ("resnets.0", "attentions.0", "resnets.1")}
    assert fastvae.explain(vae, SHAPE).reasons == dict.fromkeys(names, Reason.MIXED_DTYPES)
    _refused_alike(vae.decoder, x)
    _refused_alike(vae.encoder, an_input("encoder"))
    vae.to(torch.float32).decoder.mid_block.to(torch.bfloat16)
    vae.decoder.conv_in.to(torch.bfloat16)  # as AnimateDiff's SDXL pipeline leaves it
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.MIXED_DTYPES}
    _refused_alike(vae.decoder, x)
    vae.to(torch.float8_e4m3fn)
    assert fastvae.explain(vae, SHAPE).reasons == dict.fromkeys(BOTH, Reason.DTYPE)
    _refused_alike(vae.encoder, an_input("encoder").to(torch.float8_e4m3fn))


def _refused_alike(part, x):
    words = []
    for function in (part, functools.partial(type(part).forward, part)):
        with pytest.raises((RuntimeError, NotImplementedError)) as refused:
            function(x)
        words.append(str(refused.value))
    assert words[0] == words[1]


def test_no_reason_goes_untested():
    alone = {Reason.CPU, Reason.AUTOCAST, Reason.GRADIENT, Reason.MIXED_DTYPES, Reason.LATE}
    tested = {case.reason for case in (*BLOCKS.values(), *WHOLES.values())}
    assert tested | alone == set(Reason)
    assert not tested & alone
