"""Hooks of accelerate and diffusers on an accelerated VAE: called in any order, with correct outputs.

A hook on a whole encoder wraps the fast path; hooks on layers make these run as modules.
"""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.loaders import lora_base
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from support.listening_hooks import Listening, Registered
from swap_in.stock import (
    Walks,
    assert_computes_like,
    assert_same_bits,
    both_ways,
    is_accelerated,
    moments_of,
    offloads_groups,
    pixels,
    tiny,
    tiny_pipeline,
)

import fastvae
from fastvae.fast.fallback_reasons import Reason

pytestmark = pytest.mark.usefixtures("users_cpu")

CPU = torch.device("cpu")
SHAPE = (1, 3, 16, 16)


class Instead(ModelHook):
    """A hook of diffusers that replaces a forward."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def new_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return self.fn_ref.original_forward(*args, **kwargs)


def put_on(kind, module, calls):
    if kind == "accelerate":
        add_hook_to_module(module, Listening(calls))
    else:
        hook = {"diffusers": Registered, "diffusers, instead": Instead}[kind](calls)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, kind)


def take_off(kind, module):
    if kind == "accelerate":
        remove_hook_from_module(module)
    else:
        module._diffusers_hook.remove_hook(kind)


def orders(*kinds):
    """Yield every order of accelerate, restore and each hook's addition and removal; hooks leave in reverse order."""
    events = ["accelerate the model", "restore it", *((kind, way) for kind in kinds for way in ("on", "off"))]
    for order in itertools.permutations(events):
        hooks = [event for event in order if isinstance(event, tuple)]
        stack = []
        nested = all(
            (stack.append(kind) or True) if way == "on" else (bool(stack) and stack.pop() == kind)
            for kind, way in hooks
        )
        if nested and order.index("accelerate the model") < order.index("restore it"):
            yield order


ALONE = [("accelerate",), ("diffusers",), ("diffusers, instead",)]
IN_PAIRS = [("accelerate", "diffusers"), ("diffusers, instead", "accelerate")]


@pytest.mark.parametrize(
    ("kinds", "step"),
    [
        *(pytest.param(kinds, 1, id=" and ".join(kinds)) for kinds in ALONE),
        *(pytest.param(kinds, 13, id=f"{' and '.join(kinds)}, every thirteenth order") for kinds in IN_PAIRS),
        *(pytest.param(kinds, 1, id=" and ".join(kinds), marks=pytest.mark.slow) for kinds in IN_PAIRS),
    ],
)
def test_every_order_of_hooks_and_of_accelerating(kinds, step):
    """Called while registered, fast while accelerated, and otherwise the bits of stock."""
    some = list(orders(*kinds))
    assert len(some) == (6 if kinds in ALONE else 60)
    x, stock = pixels(), tiny()
    plain, fast = moments_of(stock, x), moments_of(fastvae.accelerate(tiny()), x)
    assert not torch.equal(plain, fast), "else nothing here could fail"
    for order in some[::step]:
        vae, calls, accelerated, hooks = copy.deepcopy(stock), [], False, 0
        for event in order:
            if event == "accelerate the model":
                fastvae.accelerate(vae)
                accelerated = True
            elif event == "restore it":
                fastvae.restore(vae)
                accelerated = False
            else:
                kind, way = event
                put_on(kind, vae.encoder, calls) if way == "on" else take_off(kind, vae.encoder)
                hooks += 1 if way == "on" else -1
            calls.clear()
            assert torch.equal(moments_of(vae, x), fast if accelerated else plain), (order, event)
            assert len(calls) == hooks, (order, event)
            if accelerated:
                assert fastvae.explain(vae, SHAPE).reasons["encoder"] is Reason.CPU, (order, event)
        assert_is_stock(vae.encoder)


def assert_is_stock(part):
    """Nothing of ours stays on a module; removed hooks leave the class's own forward."""
    own = vars(part)
    assert set(own) - set(vars(tiny().encoder)) <= {"forward", "_diffusers_hook"}
    assert getattr(own.get("forward"), "__func__", type(part).forward) is type(part).forward


@pytest.mark.parametrize("kind", ["accelerate", "diffusers", "diffusers, instead"])
def test_a_pipeline_can_be_accelerated_under_a_hook_and_keeps_both(kind, monkeypatch):
    vae, stock, calls = tiny(), tiny(), []
    for part in (vae.encoder, vae.decoder):
        put_on(kind, part, calls)
    fastvae.accelerate(vae)
    walks = Walks(monkeypatch)
    assert_computes_like(vae, stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    assert calls == [vae.encoder, vae.decoder]
    fastvae.restore(vae)
    assert_same_bits(vae, stock)
    assert not walks.taken()
    assert len(calls) == 4


# Offload. On a CPU the execution device is the CPU itself; weights that are away are on "meta".


@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_model_offload(accelerated, monkeypatch):
    """enable_model_cpu_offload hooks the whole VAE, and encode and decode call the hook."""
    vae, stock, heard = tiny(), tiny(), []
    if accelerated == "before":
        fastvae.accelerate(vae)
    offloaded, user_hook = cpu_offload_with_hook(vae, CPU)
    assert offloaded is vae
    if accelerated == "after":
        fastvae.accelerate(vae)
    pre_forward = vae._hf_hook.pre_forward
    vae._hf_hook.pre_forward = lambda *args: heard.append(args[0]) or pre_forward(*args)
    walks = Walks(monkeypatch)
    assert_computes_like(vae, stock)
    assert heard == [vae, vae]
    assert walks.taken() == ["Encoder", "Decoder"]
    user_hook.offload()
    user_hook.remove()
    assert "_hf_hook" not in vars(vae)
    assert_computes_like(vae, stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    assert_same_bits(fastvae.restore(vae), stock)


@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_sequential_offload(accelerated, monkeypatch):
    """enable_sequential_cpu_offload hooks every layer: they run as modules, and are fast again without the hooks."""
    vae, stock = tiny(), tiny()
    if accelerated == "before":
        fastvae.accelerate(vae)
    cpu_offload(vae, execution_device=CPU)
    if accelerated == "after":
        fastvae.accelerate(vae)
    assert vae.encoder.conv_in.weight.device.type == "meta"
    assert set(fastvae.explain(vae, SHAPE).reasons.values()) == {Reason.HOOKS}
    walks = Walks(monkeypatch)
    assert_same_bits(vae, stock)
    assert not walks.taken()
    remove_hook_from_module(vae, recurse=True)
    assert vae.encoder.conv_in.weight.device.type == "cpu"
    assert_computes_like(vae, stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    assert_same_bits(fastvae.restore(vae), stock)


@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_offload_of_a_whole_part(accelerated, monkeypatch):
    """One hook moves an encoder with all its layers before the fast path runs."""
    vae, stock = tiny(), tiny()
    if accelerated == "before":
        fastvae.accelerate(vae)
    for part in (vae.encoder, vae.decoder):
        add_hook_to_module(part, AlignDevicesHook(CPU, offload=True, place_submodules=True))
        assert part.conv_in.weight.device.type == "meta"
    if accelerated == "after":
        fastvae.accelerate(vae)
    walks = Walks(monkeypatch)
    for _ in range(2):
        assert_computes_like(vae, stock)
        assert walks.taken() == ["Encoder", "Decoder"]
        assert vae.encoder.conv_in.weight.device.type == "meta"
    fastvae.restore(vae)
    assert_same_bits(vae, stock)


@offloads_groups
@pytest.mark.parametrize("accelerated", ["before", "after"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_to_the_cpu(level, accelerated, monkeypatch):
    vae, stock = tiny(), tiny()
    if accelerated == "before":
        fastvae.accelerate(vae)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    vae.enable_group_offload(CPU, CPU, offload_type=level, **options)
    if accelerated == "after":
        fastvae.accelerate(vae)
    walks = Walks(monkeypatch)
    if level == "block_level":  # on encoder and decoder as wholes
        assert_computes_like(vae, stock)
        assert walks.taken() == ["Encoder", "Decoder"]
    else:
        assert_same_bits(vae, stock)
        assert not walks.taken()
    assert_same_bits(fastvae.restore(vae), stock)
    assert not walks.taken()


@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_layerwise_casting(accelerated, monkeypatch):
    """Weights stored in fp8 and computed in fp32, as without fastvae; the parts run as modules."""
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    vae, stock = tiny(), tiny()
    stock.enable_layerwise_casting(**cast)
    if accelerated == "before":
        fastvae.accelerate(vae)
    vae.enable_layerwise_casting(**cast)
    if accelerated == "after":
        fastvae.accelerate(vae)
    assert vae.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    walks = Walks(monkeypatch)
    assert_same_bits(vae, stock)
    assert not walks.taken()
    assert_same_bits(fastvae.restore(vae), stock)


def test_the_pipelines_own_calls_around_hooks():
    """LoRA loaders remove the hook of every component; so does remove_all_hooks."""
    pipe, stock = fastvae.accelerate(tiny_pipeline()), tiny()
    expected = both_ways(fastvae.accelerate(tiny()))
    cpu_offload_with_hook(pipe.vae, CPU)
    assert lora_base._func_optionally_disable_offloading(pipe) == (True, False, False)
    assert "_hf_hook" not in vars(pipe.vae)
    cpu_offload(pipe.vae, execution_device=CPU)
    pipe.remove_all_hooks()
    pipe.maybe_free_model_hooks()
    assert is_accelerated(pipe.vae)
    assert all(map(torch.equal, both_ways(pipe.vae), expected))
    pipe.reset_device_map()
    assert_same_bits(fastvae.restore(pipe).vae, stock)


def test_the_fused_kernels_run_under_a_hook(monkeypatch):
    """The bits are those without the hook."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", KERNEL_DEVICES)
    vae, x, calls = fastvae.accelerate(tiny()), pixels(size=8), []
    put_on("accelerate", vae.encoder, calls)
    under = moments_of(vae, x)
    take_off("accelerate", vae.encoder)
    assert torch.equal(moments_of(vae, x), under)
    assert len(calls) == 1
    assert fastvae.fast_report(vae)["rows"] == 2
