"""Training through the fused ops: outputs and gradients of eager, with gradient checkpointing and without."""

import copy

import pytest
import torch
from fast.small_models import LIBRARIES, pixels, small_model
from support.accuracy import assert_as_accurate

import fastvae


def step(vae, x):
    """The reconstruction, and all gradients in one vector, each parameter's by the size of its own in float64.

    Together, because a vector of 4 sums over 768 pixels errs more than eager's by chance: in fp32 one in ten does.
    """
    vae.zero_grad()
    out = vae(x).sample
    (out - x).square().sum().backward()
    return out.detach(), [parameter.grad for parameter in vae.parameters()]


def whitened(gradients, truth):
    sizes = [exact.square().mean().sqrt() for exact in truth]
    cancelled = [size < 1e-9 * max(sizes) for size in sizes]
    # The bias of the keys has no gradient in truth: what is constant along a row cancels in the softmax.
    assert sum(cancelled) in (0, 2)
    for ours, is_nothing in zip(gradients, cancelled, strict=True):
        assert not is_nothing or ours.abs().max() < 1e-6 * max(sizes)
    pairs = zip(gradients, sizes, cancelled, strict=True)
    return torch.cat([(ours / size).flatten().to(ours.dtype) for ours, size, is_nothing in pairs if not is_nothing])


SLOWER = [("FLUX: no quant_conv", "diffusers"), ("CogView: no attention, two residual blocks", "fastvae")]
SLOWER += [("FLUX.2", "diffusers"), ("128 channels", "fastvae")]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize(
    ("shape", "hand"),
    [*(("SD", hand) for hand in LIBRARIES), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER)],
)
def test_gradients_are_those_of_eager(shape, hand, checkpointing):
    vae = small_model(shape, hand).requires_grad_(True).train()
    x = pixels(vae, batch=1, height=12, width=8)
    eager, exact = copy.deepcopy(vae), copy.deepcopy(vae).double()
    if checkpointing:
        vae.enable_gradient_checkpointing()
    fastvae.accelerate(vae)
    assert {row.path for row in fastvae.explain(vae).rows} == {"differentiable"}
    (out, ours), (eager_out, plain), (exact_out, truth) = (
        step(model, x.to(dtype)) for model, dtype in ((vae, x.dtype), (eager, x.dtype), (exact, torch.float64))
    )
    assert_as_accurate(out, eager_out, exact_out)
    assert_as_accurate(whitened(ours, truth), whitened(plain, truth), whitened(truth, truth))


def test_one_gradient_step_changes_the_next_output():
    """Nothing of an older step is kept: what training sees is what the parameters are."""
    vae = fastvae.accelerate(small_model(), freeze=True).requires_grad_(True)
    x = pixels(vae, batch=1, height=8, width=8)
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-3)
    before, _ = step(vae, x)
    optimizer.step()
    after, _ = step(vae, x)
    assert not torch.equal(before, after)


def test_the_gradient_of_an_input_goes_through_a_frozen_model():
    """As for guidance by a loss on pixels: no parameter wants a gradient, the latents do."""
    vae = small_model()
    exact = copy.deepcopy(vae).double()
    eager = copy.deepcopy(vae)
    fastvae.accelerate(vae)
    z = torch.randn(1, 4, 3, 4)
    grads = []
    for model, dtype in ((vae, torch.float32), (eager, torch.float32), (exact, torch.float64)):
        given = z.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(model.decode(given).sample.square().sum(), given)[0])
    assert_as_accurate(*grads)


def test_frozen_parameters_leave_no_graph_whatever_grad_mode_says():
    vae = fastvae.accelerate(small_model())
    x = pixels(vae, batch=1, height=8, width=8)
    assert torch.is_grad_enabled()
    assert not vae.encode(x).latent_dist.parameters.requires_grad
    assert {row.path for row in fastvae.explain(vae).rows} == {"fused"}


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["fused", "in place"])
@pytest.mark.parametrize("where", ["down_blocks.0.resnets.0", "down_blocks.1", "mid_block.resnets.1"])
def test_a_gradient_that_a_hook_asks_for_is_eagers(where, devices, monkeypatch):
    """No parameter and no input wants one, and what a hook adds on the way does: guidance and control do this."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", devices)
    vae = small_model("CogView: no attention, two residual blocks")
    exact, eager = copy.deepcopy(vae).double(), copy.deepcopy(vae)
    fastvae.accelerate(vae, freeze=True)
    found = []
    for model in (vae, eager, exact):
        x = pixels(model, batch=1, height=8, width=8)
        model.encoder(x)  # with nothing to differentiate: weights are packed
        channels = 32 if where.startswith("down_blocks.0") else 96
        added = torch.linspace(-1, 1, channels, dtype=x.dtype).view(-1, 1, 1).requires_grad_()
        model.encoder.get_submodule(where).register_forward_hook(lambda module, given, y, added=added: y + added)
        y = model.encode(x).latent_dist.parameters
        found.append((y, torch.autograd.grad(y.square().sum(), added)[0]))
    for ours, plain, truth in zip(*found, strict=True):
        assert_as_accurate(ours.detach(), plain.detach(), truth.detach())
