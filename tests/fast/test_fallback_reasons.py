"""Every reason to fall back: explain names exactly the blocks that do, as data and text, and results are correct.

A block that falls back runs between fused ones and is compared with float64; a whole encoder or decoder that falls
back has eager's bits. Hooks are called as often as in eager.
"""

import copy
import functools
import types
from dataclasses import dataclass

import accelerate.hooks
import diffusers
import peft
import pytest
import torch
from diffusers.hooks import HookRegistry
from fast.small_models import LIBRARIES, TWO
from fastvae_kernels.shared.runtime import INTERPRETED
from support.accuracy import assert_as_accurate
from support.listening_hooks import Listening, Registered
from support.short_run import short_run
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import fastvae
from fastvae.fast import fallback_reasons
from fastvae.fast.fallback_reasons import Reason

SHAPE = (1, 3, 8, 8)
RESNET = "encoder.down_blocks.0.resnets.0"
MID_RESNET, ATTENTION = "encoder.mid_block.resnets.1", "encoder.mid_block.attentions.0"
DOWN, UP = "encoder.down_blocks.0.downsamplers.0", "decoder.up_blocks.0.upsamplers.0"
ATTENTIONS = {ATTENTION, "decoder.mid_block.attentions.0"}


@functools.cache
def _tiny(library, config):
    torch.manual_seed(0)
    small = {**TWO, "block_out_channels": (8, 16), "norm_num_groups": 1, "layers_per_block": 1, **dict(config)}
    return getattr(LIBRARIES[library], "AutoencoderKL")(**small).eval().requires_grad_(False)  # noqa: B009


def tiny(library="fastvae", **config):
    """The smallest model with a block of every kind."""
    return copy.deepcopy(_tiny(library, tuple(config.items())))


def an_input(part, batch=1):
    """Return pixels of 8 x 8, or the latents of such images."""
    shape = (batch, 3, 8, 8) if part == "encoder" else (batch, 4, 4, 4)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Changes of a model: each takes the model and a list to which its hooks append.


def hook(name):
    def change(vae, calls):
        vae.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))

    return change


def pre_hook(name):
    def change(vae, calls):
        vae.get_submodule(name).register_forward_pre_hook(lambda *_: calls.append(name))

    return change


def hook_of_accelerate(name):
    return lambda vae, calls: accelerate.hooks.add_hook_to_module(vae.get_submodule(name), Listening(calls))


def hook_of_diffusers(name):
    def change(vae, calls):
        registry = HookRegistry.check_if_exists_or_initialize(vae.get_submodule(name))
        registry.register_hook(Registered(calls), "listening")

    return change


def replaced_forward(name):
    def change(vae, calls):
        module = vae.get_submodule(name)
        own = module.forward

        def forward(*args, **kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        module.forward = forward

    return change


def foreign_forward(name):
    def change(vae, calls):
        module = vae.get_submodule(name)
        kind = type(module)

        class Foreign(kind):
            def forward(self, x, *args, **kwargs):
                calls.append(name)
                return kind.forward(self, x, *args, **kwargs) * 1.5

        module.__class__ = Foreign

    return change


def adapters(*names, learning=False):
    def change(vae, calls):
        config = peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)
        if isinstance(vae, diffusers.AutoencoderKL):
            vae.add_adapter(config)
        else:
            peft.inject_adapter_in_model(config, vae)
        vae.requires_grad_(learning)

    return change


def parametrised(name):
    def change(vae, calls):
        nn.utils.parametrizations.weight_norm(vae.get_submodule(name))
        assert parametrize.is_parametrized(vae.get_submodule(name))

    return change


def pruned(name):
    return lambda vae, calls: prune.l1_unstructured(vae.get_submodule(name), "weight", 0.5)


class Attending:
    """A processor that is not built in."""

    def __init__(self, own, calls):
        self.own, self.calls = own, calls

    def __call__(self, attention, hidden_states, *args, **kwargs):
        self.calls.append("attention")
        return 1.5 * self.own(attention, hidden_states, *args, **kwargs)


def custom_processor(vae, calls):
    own = next(iter(vae.attn_processors.values()))
    vae.set_attn_processor(Attending(own, calls))


def dropping(vae, calls):
    vae.train()
    vae.get_submodule(MID_RESNET).dropout.p = 1.0  # drops the same elements in every layout and dtype: all


def heads(vae, calls):
    vae.get_submodule(ATTENTION).heads = 2


class Weight(torch.Tensor):
    """A subclass of Tensor, as quantisers use for weights."""


def stored_otherwise(name):
    def change(vae, calls):
        layer = vae.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight), requires_grad=False)

    return change


def layer(name, make):
    def change(vae, calls):
        parent, _, last = name.rpartition(".")
        setattr(vae.get_submodule(parent), last, make())

    return change


def conv(channels, **options):
    return lambda: nn.Conv2d(channels, channels, 3, **options).requires_grad_(False)


def nothing(vae, calls):
    pass


def every(part, kind):
    """Return the names of a part's blocks of one kind, resnets or attentions."""
    return {name for name, _ in tiny().named_modules() if name.startswith(part) and name.split(".")[-2:-1] == [kind]}


@dataclass
class Case:
    """A change of a model, and the blocks that fall back because of it."""

    change: object
    reason: Reason
    names: set
    library: str = "fastvae"
    config: dict | None = None

    def model(self, calls):
        vae = tiny(self.library, **(self.config or {}))
        torch.manual_seed(0)
        self.change(vae, calls)
        return vae


BLOCKS = {
    "forward hook on a convolution": Case(hook(f"{RESNET}.conv1"), Reason.HOOKS, {RESNET}),
    "forward hook on a residual block": Case(hook(MID_RESNET), Reason.HOOKS, {MID_RESNET}, "diffusers"),
    "forward hook on a down block": Case(
        hook("encoder.down_blocks.0"), Reason.HOOKS, {"encoder.down_blocks.0"}, "diffusers"
    ),
    "forward hook on an up block": Case(hook("decoder.up_blocks.1"), Reason.HOOKS, {"decoder.up_blocks.1"}),
    "forward hook on a projection": Case(hook(f"{ATTENTION}.to_q"), Reason.HOOKS, {ATTENTION}, "diffusers"),
    "pre-hook on a norm": Case(
        pre_hook("decoder.up_blocks.1.resnets.1.norm2"), Reason.HOOKS, {"decoder.up_blocks.1.resnets.1"}
    ),
    "pre-hook on a downsampler": Case(pre_hook(DOWN), Reason.HOOKS, {DOWN}),
    "pre-hook on an upsampler's convolution": Case(pre_hook(f"{UP}.conv"), Reason.HOOKS, {UP}, "diffusers"),
    "accelerate's hook": Case(hook_of_accelerate(f"{RESNET}.conv2"), Reason.HOOKS, {RESNET}, "diffusers"),
    "diffusers' hook": Case(hook_of_diffusers(MID_RESNET), Reason.HOOKS, {MID_RESNET}, "diffusers"),
    "pruning": Case(pruned(f"{RESNET}.conv2"), Reason.HOOKS, {RESNET}),
    "replaced forward": Case(replaced_forward(RESNET), Reason.REPLACED_FORWARD, {RESNET}, "diffusers"),
    "foreign residual block": Case(foreign_forward(RESNET), Reason.FOREIGN_FORWARD, {RESNET}, "diffusers"),
    "foreign down block": Case(
        foreign_forward("encoder.down_blocks.0"), Reason.FOREIGN_FORWARD, {"encoder.down_blocks.0"}
    ),
    "adapters": Case(adapters(f"{RESNET}.conv1", f"{ATTENTION}.to_q"), Reason.PEFT, {RESNET, ATTENTION}),
    "adapters that learn": Case(adapters(f"{MID_RESNET}.conv2", learning=True), Reason.PEFT, {MID_RESNET}, "diffusers"),
    "weight norm": Case(parametrised(f"{RESNET}.conv1"), Reason.PARAMETRISED, {RESNET}),
    "custom processor": Case(custom_processor, Reason.PROCESSOR, ATTENTIONS),
    "custom processor, diffusers": Case(custom_processor, Reason.PROCESSOR, ATTENTIONS, "diffusers"),
    "dropout": Case(dropping, Reason.DROPOUT, {MID_RESNET}),
    "subclassed weight": Case(stored_otherwise(f"{RESNET}.conv1"), Reason.QUANTISED, {RESNET}),
    "two heads": Case(heads, Reason.UNSUPPORTED_LAYER, {ATTENTION}, "diffusers"),
    "gelu": Case(
        nothing,
        Reason.UNSUPPORTED_LAYER,
        every("encoder", "resnets") | every("decoder", "resnets"),
        "diffusers",
        {"act_fn": "gelu"},
    ),
    "convolution by groups": Case(
        layer(f"{RESNET}.conv1", conv(8, padding=1, groups=2)), Reason.UNSUPPORTED_LAYER, {RESNET}
    ),
    "dilated convolution": Case(
        layer(f"{UP}.conv", conv(16, padding=2, dilation=2)), Reason.UNSUPPORTED_LAYER, {UP}, "diffusers"
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
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


# Each kind of block, hook and forward as a module between fused blocks.
COMPUTED = [
    "forward hook on a down block", "pre-hook on a downsampler", "accelerate's hook", "foreign residual block",
    "adapters that learn", "custom processor", "dropout", "dilated convolution",
]  # fmt: skip


@pytest.mark.parametrize("name", short_run(BLOCKS, COMPUTED))
def test_a_block_falls_back_and_the_rest_stays_fused(name, monkeypatch):
    case, heard, heard_by_eager = BLOCKS[name], [], []
    part = max(case.names).split(".")[0]
    # In channels_last as our convolutions: on a CPU the rounding depends on the layout.
    vae, eager = case.model(heard), case.model(heard_by_eager).to(memory_format=torch.channels_last)
    truth = case.model([]).double()
    told = fastvae.explain(fastvae.accelerate(vae), SHAPE)
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


@pytest.mark.parametrize("act_fn", ["relu", "mish"])
def test_no_other_activation_is_taken_for_silu(act_fn):
    told = fastvae.explain(fastvae.accelerate(tiny(act_fn=act_fn)), SHAPE)
    assert set(told.reasons.values()) == {Reason.UNSUPPORTED_LAYER}
    assert set(told.reasons) == every("encoder", "resnets") | every("decoder", "resnets")


# Where a whole encoder or decoder falls back.


def offloaded(vae, calls):
    """Weights on the meta device; hooks on every layer load them while it runs."""
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert vae.encoder.conv_in.weight.device.type == "meta"


def offloaded_by_group(vae, calls):
    vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def stored_in_fp8(vae, calls):
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def double(vae, calls):
    vae.double()


def on_meta(vae, calls):
    vae.to("meta")


BOTH = {"encoder", "decoder"}
WHOLES = {
    "float64": Case(double, Reason.DTYPE, BOTH),
    "offloaded by accelerate": Case(offloaded, Reason.HOOKS, BOTH, "diffusers"),
    "offloaded by accelerate, fastvae": Case(offloaded, Reason.HOOKS, BOTH),
    "offloaded by diffusers": Case(offloaded_by_group, Reason.HOOKS, BOTH, "diffusers"),
    "stored in fp8 by diffusers": Case(stored_in_fp8, Reason.HOOKS, BOTH, "diffusers"),
    "hook on the first convolution": Case(hook("encoder.conv_in"), Reason.HOOKS, {"encoder"}),
    "meta": Case(on_meta, Reason.META, BOTH),
    "subclassed weight at the end": Case(stored_otherwise("decoder.conv_out"), Reason.QUANTISED, {"decoder"}),
    "replaced forward of the encoder": Case(replaced_forward("encoder"), Reason.REPLACED_FORWARD, {"encoder"}),
    "foreign encoder": Case(foreign_forward("encoder"), Reason.FOREIGN_FORWARD, {"encoder"}, "diffusers"),
    "adapter at the start": Case(adapters("encoder.conv_in"), Reason.PEFT, {"encoder"}),
    "weight norm at the end": Case(parametrised("decoder.conv_out"), Reason.PARAMETRISED, {"decoder"}),
    "another last activation": Case(layer("encoder.conv_act", nn.GELU), Reason.UNSUPPORTED_LAYER, {"encoder"}),
    "exact": Case(nothing, Reason.EXACT, BOTH),
}


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
    vae, eager, x = fastvae.accelerate(tiny(library)), tiny(library), an_input("encoder")
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
    vae, calls = tiny("diffusers"), []
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


# Other models, pipelines, and the order in which hooks are added and removed.

SMALL = {**TWO, "norm_num_groups": 2}


def test_the_encoder_of_an_asymmetric_autoencoder_is_fast():
    torch.manual_seed(0)
    vae = diffusers.AsymmetricAutoencoderKL(
        **SMALL,
        down_block_out_channels=(8, 16),
        up_block_out_channels=(8, 16),
        layers_per_down_block=1,
        layers_per_up_block=1,
    ).eval()
    vae.requires_grad_(False)
    z, x = an_input("decoder"), an_input("encoder")
    before, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    fastvae.accelerate(vae)
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.UNSUPPORTED_LAYER}
    assert torch.equal(vae.decode(z).sample, before)
    torch.testing.assert_close(vae.encode(x).latent_dist.parameters, moments)


def test_a_vq_model_is_fast_and_no_posterior_is_made_up():
    torch.manual_seed(0)
    vae = diffusers.VQModel(**SMALL, block_out_channels=(8, 16), latent_channels=4, num_vq_embeddings=8).eval()
    vae.requires_grad_(False)
    x = an_input("encoder")
    before = vae.encode(x).latents
    fastvae.accelerate(vae)
    assert not fastvae.explain(vae, SHAPE).reasons
    torch.testing.assert_close(vae.encode(x).latents, before)
    with pytest.raises(AttributeError, match="latent_dist"):
        fastvae.encode_latents(vae, x, posterior="mode")


def test_spatial_norms_fall_back():
    """Kandinsky's decoder: its norms take the latents, so it is called with them."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "latent_channels": 4, "num_vq_embeddings": 8, "norm_type": "spatial"}
    vae = diffusers.VQModel(**SMALL, **sizes).eval().requires_grad_(False)
    z = an_input("decoder")
    before = vae.decode(z).sample
    fastvae.accelerate(vae)
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.UNSUPPORTED_LAYER}
    assert torch.equal(vae.decode(z).sample, before)


def test_the_encoder_of_a_temporal_autoencoder_is_fast():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=TWO["down_block_types"], block_out_channels=(32, 64), layers_per_block=1
    ).eval()
    vae.requires_grad_(False)
    z = an_input("decoder", batch=2)
    before = vae.decode(z, num_frames=2).sample
    fastvae.accelerate(vae)
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.UNSUPPORTED_LAYER}
    assert torch.equal(vae.decode(z, num_frames=2).sample, before)


def test_other_models_are_refused():
    small = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    tinier = diffusers.AutoencoderTiny(**small, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    for refused in (tinier, nn.Linear(2, 2), object(), None):
        with pytest.raises(TypeError, match=type(refused).__name__):
            fastvae.accelerate(refused)
    assert "_fastvae" not in vars(tinier)
    for function in (fastvae.restore, fastvae.refresh, fastvae.fast_report, fastvae.explain):
        with pytest.raises(TypeError, match="Linear"):
            function(nn.Linear(2, 2))
    for function in (fastvae.refresh, fastvae.fast_report, fastvae.explain):
        with pytest.raises(ValueError, match="not accelerated"):
            function(tiny())


def test_a_pipeline_is_taken_by_its_vae():
    pipe = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4, norm_num_groups=1
        ),
        vae=tiny("diffusers"),
        scheduler=diffusers.DDIMScheduler(),
    )
    before = pipe.vae.encoder(an_input("encoder"))
    assert fastvae.accelerate(pipe) is pipe
    assert not fastvae.explain(pipe, SHAPE).reasons
    assert type(pipe.vae) is diffusers.AutoencoderKL
    pipe.vae.encoder(an_input("encoder"))
    assert fastvae.fast_report(pipe)["rows"] == 1
    assert fastvae.restore(pipe) is pipe
    assert torch.equal(pipe.vae.encoder(an_input("encoder")), before)
    stub = types.SimpleNamespace(vae=tiny())
    assert fastvae.accelerate(stub) is stub
    assert not fastvae.explain(stub, SHAPE).reasons


@pytest.mark.parametrize("library", short_run(LIBRARIES, ["diffusers"]))
def test_restore_gives_the_bits_of_before(library):
    vae, x, z = tiny(library), an_input("encoder"), an_input("decoder")
    before, attributes = (vae.encoder(x), vae.decoder(z)), [set(vars(module)) for module in vae.modules()]
    fastvae.accelerate(vae)
    first = vae.encoder(x)
    fastvae.accelerate(vae, deterministic=True)
    assert torch.equal(vae.encoder(x), first), (
        "accelerating twice changes nothing, nor does deterministic for one image"
    )
    for _ in range(2):
        fastvae.restore(vae)
        assert torch.equal(vae.encoder(x), before[0])
        assert torch.equal(vae.decoder(z), before[1])
        assert [set(vars(module)) for module in vae.modules()] == attributes


def put_on(kind, module, calls):
    if kind == "accelerate":
        accelerate.hooks.add_hook_to_module(module, Listening(calls))
    else:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Registered(calls), "listening")


def take_off(kind, module):
    if kind == "accelerate":
        accelerate.hooks.remove_hook_from_module(module)
    else:
        module._diffusers_hook.remove_hook("listening")


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_a_hook_that_comes_later_and_goes(kind):
    """It wraps the fast path, is called, and keeps it when removed; restored below it, the model is stock."""
    vae, x, calls = tiny("diffusers"), an_input("encoder"), []
    before = vae.encoder(x)
    fastvae.accelerate(vae)
    put_on(kind, vae.encoder, calls)
    assert not fastvae.explain(vae, SHAPE).reasons
    fast = vae.encoder(x)
    assert len(calls) == fastvae.fast_report(vae)["rows"] == 1
    take_off(kind, vae.encoder)
    assert not fastvae.explain(vae, SHAPE).reasons
    assert torch.equal(vae.encoder(x), fast)
    assert fastvae.fast_report(vae)["rows"] == 2

    put_on(kind, vae.encoder, calls)
    fastvae.restore(vae)
    assert torch.equal(vae.encoder(x), before)
    take_off(kind, vae.encoder)
    assert torch.equal(vae.encoder(x), before)
    assert len(calls) == 2
    fastvae.accelerate(vae)
    assert not fastvae.explain(vae, SHAPE).reasons, "a removed hook leaves no trace"


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_a_hook_that_was_taken_off_is_no_reason(kind):
    """pipe.remove_all_hooks() leaves the class's own forward on every module that had a hook."""
    vae = tiny("diffusers")
    names = ("encoder", RESNET, f"{RESNET}.conv1", ATTENTION)
    for name in names:
        put_on(kind, vae.get_submodule(name), [])
    for name in names:
        take_off(kind, vae.get_submodule(name))
    assert not fastvae.explain(fastvae.accelerate(vae), SHAPE).reasons


def test_a_forward_replaced_later_is_named():
    vae = fastvae.accelerate(tiny())
    own, calls = vae.encoder.forward, []
    replaced_forward("encoder")(vae, calls)
    assert fastvae.explain(vae, SHAPE).reasons == {"encoder": Reason.REPLACED_FORWARD}
    vae.encoder.forward = own
    assert not fastvae.explain(vae, SHAPE).reasons


def test_no_reason_goes_untested():
    alone = {Reason.CPU, Reason.AUTOCAST, Reason.GRADIENT, Reason.MIXED_DTYPES, Reason.LATE}
    tested = {case.reason for case in (*BLOCKS.values(), *WHOLES.values())}
    assert tested | alone == set(Reason)
    assert not tested & alone
