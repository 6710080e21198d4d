"""Changes that make blocks or whole parts of a small model fall back, with the reason of each."""

import copy
import functools
from dataclasses import dataclass

import accelerate.hooks
import diffusers
import peft
import torch
from diffusers.hooks import HookRegistry
from fast.small_models import LIBRARIES, TWO
from support.listening_hooks import Listening, Registered
from torch import nn
from torch.nn.utils import parametrize, prune

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
