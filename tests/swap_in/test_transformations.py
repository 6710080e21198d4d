"""Changes to a model before or after it is accelerated: adapters, compilation, checkpointing, fused projections.

Every step is compared with a stock copy that is changed in the same way.
"""

import copy

import diffusers
import peft
import pytest
import torch
from fast.small_models import FEWEST, ONE_BLOCK
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from support.accuracy import assert_as_accurate
from swap_in.stock import (
    Walks,
    assert_computes_like,
    assert_same_bits,
    both_ways,
    fast_and_stock,
    is_accelerated,
    latents,
    moments_of,
    pixels,
    tiny,
    tiny_pipeline,
)

import fastvae
from fastvae.fast.fallback_reasons import Reason

pytestmark = pytest.mark.usefixtures("users_cpu")

SHAPE = (1, 3, 16, 16)
LIBRARIES = ["diffusers", "fastvae"]


# LoRA by PEFT, through diffusers' own methods.


def adapted(vae, name, seed, *targets):
    torch.manual_seed(seed)
    vae.add_adapter(peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), adapter_name=name)
    vae.requires_grad_(False)


ADAPTER_STEPS = {
    "one is added": lambda vae: adapted(vae, "one", 1, "to_q", "resnets.0.conv1"),
    "another is added": lambda vae: adapted(vae, "two", 2, "to_v"),
    "both are active": lambda vae: vae.set_adapters(["one", "two"], [0.5, 2.0]),
    "all are disabled": lambda vae: vae.disable_adapters(),
    "all are enabled": lambda vae: vae.enable_adapters(),
    "one is active": lambda vae: vae.set_adapter("one"),
    "they are merged": lambda vae: vae.fuse_lora(),
    "they are taken out": lambda vae: vae.unfuse_lora(),
    "one is deleted": lambda vae: vae.delete_adapters("two"),
}


def test_adapters_through_their_whole_life(monkeypatch):
    """Blocks with adapters run as modules, the rest is fast, and everything is fast again without them."""
    vae, stock = fast_and_stock()
    walks, seen = Walks(monkeypatch), []
    for step, change in ADAPTER_STEPS.items():
        for model in (vae, stock):
            change(model)
            model.requires_grad_(False)  # what is made active learns
        assert_computes_like(vae, stock)
        assert walks.taken() == ["Encoder", "Decoder"], step
        seen.append(moments_of(stock, pixels()))
    before_merging, merged = seen[5], seen[6]
    torch.testing.assert_close(before_merging, merged)
    assert len({tuple(moments.flatten().tolist()) for moments in seen}) > 5, "the adapters did nothing"
    for model in (vae, stock):
        model.unload_lora()
    assert vae.state_dict().keys() == tiny().state_dict().keys()
    assert_computes_like(vae, stock)
    torch.testing.assert_close(moments_of(vae, pixels()), moments_of(tiny(), pixels()))
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ("cpu",))
    assert not fastvae.explain(vae, SHAPE).reasons, "removed adapters leave no reason"


def test_an_adapter_on_the_first_convolution_keeps_the_part_from_the_walk(monkeypatch):
    vae, stock = fast_and_stock()
    for model in (vae, stock):
        adapted(model, "first", 1, "encoder.conv_in")
    walks = Walks(monkeypatch)
    assert torch.equal(moments_of(vae, pixels()), moments_of(stock, pixels()))
    assert not walks.taken()
    assert fastvae.explain(vae, SHAPE).reasons["encoder"] is Reason.PEFT


def test_an_adapter_is_trained_saved_and_loaded(tmp_path):
    """Its gradients are stock's, and its file loads into a stock and into an accelerated model."""
    exact, stock, vae = tiny().double(), tiny(), fastvae.accelerate(tiny())
    gradients = []
    for model in (vae, stock, exact):
        adapted(model, "style", 1, "to_q", "conv2")
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora" in name)
        weights = [weight for name, weight in model.named_parameters() if "lora" in name]
        x = pixels(dtype=model.dtype)
        torch.manual_seed(3)
        for weight in weights:  # of the same values in every dtype
            weight.data.copy_(torch.randn(weight.shape) / 4)
        moments_of(model, x).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        model.requires_grad_(False)
    assert_as_accurate(*gradients)
    name = {"weight_name": "style.safetensors"}
    vae.save_lora_adapter(tmp_path, adapter_name="style", **name)
    loaded = [tiny(), fastvae.accelerate(tiny())]
    for model in loaded:
        model.load_lora_adapter(tmp_path, prefix=None, **name)
        model.requires_grad_(False)
    assert_same_bits(loaded[0], stock)
    assert_computes_like(loaded[1], stock)


# torch.compile, as pipelines assign it back.


@pytest.fixture
def _compile_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(vae, *methods):
    for name in methods:
        setattr(vae, name, torch.compile(getattr(vae, name), backend="eager"))
    return vae


@pytest.mark.usefixtures("_compile_anew")
@pytest.mark.parametrize(
    ("library", "accelerated", "methods", "config"),
    [
        pytest.param("diffusers", "before", ("encode",), FEWEST, id="before, no attention"),
        pytest.param("fastvae", "after", ("encode",), FEWEST, id="after, no attention"),
        pytest.param("diffusers", "before", ("encode", "decode"), {}, id="before", marks=pytest.mark.slow),
        pytest.param("fastvae", "after", ("encode", "decode"), {}, id="after", marks=pytest.mark.slow),
    ],
)
def test_compiled_methods_follow_accelerate_and_restore(library, accelerated, methods, config):
    """pipe.vae.decode = torch.compile(pipe.vae.decode): a graph compiled before the change is not run again."""
    vae, stock = tiny(library, **config), tiny(library, **config)
    if accelerated == "before":
        vae = compiled(fastvae.accelerate(vae), *methods)
    else:
        vae = fastvae.accelerate(compiled(vae, *methods))
    fast = both_ways(vae)
    assert not torch.equal(fast[0], both_ways(stock)[0]), "else nothing here could fail"
    assert_computes_like(vae, stock)
    assert_same_bits(fastvae.restore(vae), stock)
    fastvae.accelerate(vae)
    assert all(map(torch.equal, both_ways(vae), fast))
    fastvae.accelerate(vae, precision="exact")
    assert_same_bits(vae, stock)


@pytest.mark.usefixtures("_compile_anew")
def test_a_compiled_model_in_a_pipeline_is_saved_as_itself(tmp_path):
    pipe, stock = fastvae.accelerate(tiny_pipeline(tiny(**ONE_BLOCK))), tiny(**ONE_BLOCK)
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert_computes_like(pipe.vae, stock)
    torch.testing.assert_close(pipe.vae(pixels()).sample, stock(pixels()).sample)
    pipe.save_pretrained(tmp_path)
    assert_same_bits(diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"), stock)
    assert is_accelerated(pipe.vae._orig_mod)
    assert_same_bits(fastvae.restore(pipe.vae._orig_mod), stock)


# Gradient checkpointing.


@pytest.mark.parametrize("order", ["checkpointing first", "accelerated first"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_gradient_checkpointing(library, order):
    """The backward pass recomputes as many blocks as stock, and the gradients are stock's."""
    models, counts, gradients = [tiny(library), tiny(library), tiny(library).double()], [], []
    if order == "accelerated first":
        fastvae.accelerate(models[0])
    for model in models:
        model.requires_grad_(True).train()
        model.enable_gradient_checkpointing()
    if order == "checkpointing first":
        fastvae.accelerate(models[0])
    for model in models:
        calls = []
        for part in (model.encoder, model.decoder):
            part._gradient_checkpointing_func = counted(part._gradient_checkpointing_func, calls)
        x = pixels(dtype=model.dtype)
        assert model.is_gradient_checkpointing
        (model(x).sample - x).square().mean().backward()
        counts.append(len(calls))
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert counts[0] == counts[1] == 6  # two blocks and the one in the middle, in the encoder and the decoder
    assert_as_accurate(*gradients)
    models[0].disable_gradient_checkpointing()
    assert not models[0].is_gradient_checkpointing


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_gradient_checkpointing_of_the_fused_kernels(monkeypatch):
    """In the interpreter every block with a gradient goes through the part's own checkpointing."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", KERNEL_DEVICES)
    vae, calls = fastvae.accelerate(tiny()).requires_grad_(True).train(), []
    vae.enable_gradient_checkpointing()
    vae.encoder._gradient_checkpointing_func = counted(vae.encoder._gradient_checkpointing_func, calls)
    moments_of(vae, pixels(size=4)).sum().backward()
    assert len(calls) == 3
    with torch.no_grad():
        moments_of(vae, pixels(size=4))
    assert len(calls) == 3


# Fused projections.


@pytest.mark.parametrize("order", ["fused first", "accelerated first"])
def test_a_pipelines_projections_are_fused_and_taken_apart(order, monkeypatch):
    pipes = [tiny_pipeline(), tiny_pipeline()]
    if order == "accelerated first":
        fastvae.accelerate(pipes[0])
    for pipe in pipes:
        pipe.fuse_qkv_projections(unet=False, vae=True)
        pipe.vae.requires_grad_(False)
    if order == "fused first":
        fastvae.accelerate(pipes[0])
    (vae, stock), walks = (pipe.vae for pipe in pipes), Walks(monkeypatch)
    assert hasattr(vae.encoder.mid_block.attentions[0], "to_qkv")
    # A change of the fused layer changes the output, so this layer computes.
    for model in (vae, stock):
        model.encoder.mid_block.attentions[0].to_qkv.weight.data.mul_(1.5)
    assert_computes_like(vae, stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    assert not torch.allclose(moments_of(stock, pixels()), moments_of(tiny(), pixels()), atol=1e-5)
    for pipe in pipes:
        pipe.unfuse_qkv_projections(unet=False, vae=True)
    assert_computes_like(vae, tiny())
    assert vae.state_dict().keys() == stock.state_dict().keys()
    assert_same_bits(fastvae.restore(vae), stock)


def test_a_copy_made_between_the_steps_is_right():
    """A copy of a recast model with adapters computes as its original."""
    vae, stock = fast_and_stock()
    for model in (vae, stock):
        adapted(model, "one", 1, "to_out.0")
        model.to(torch.bfloat16)
    twin = copy.deepcopy(vae)
    assert all(map(torch.equal, both_ways(twin, torch.bfloat16), both_ways(vae, torch.bfloat16)))
    assert_computes_like(twin, stock, torch.bfloat16)
    assert_same_bits(fastvae.restore(twin), stock, torch.bfloat16)
    z = latents(dtype=torch.bfloat16)
    assert_as_accurate(
        vae.decode(z).sample, stock.decode(z).sample, copy.deepcopy(stock).double().decode(z.double()).sample
    )
