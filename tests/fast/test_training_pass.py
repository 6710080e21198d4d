"""Training through the fused ops: eager's outputs and gradients, with and without gradient checkpointing."""

import copy

import pytest
import torch
from fast.small_models import FEWEST, LIBRARIES, pixels, small_model, smallest_model
from support.accuracy import assert_as_accurate
from support.short_run import short_run

import fastvae


def step(vae, x):
    """Return the reconstruction and the gradients of all parameters after one backward pass."""
    vae.zero_grad()
    out = vae(x).sample
    (out - x).square().sum().backward()
    return out.detach(), [parameter.grad for parameter in vae.parameters()]


def whitened(gradients, truth):
    """Return all gradients as one vector, each parameter's divided by its rms in float64.

    One vector, because a vector of 4 sums over 768 pixels errs more than eager's by chance: in fp32 one in ten does.
    """
    sizes = [exact.square().mean().sqrt() for exact in truth]
    cancelled = [size < 1e-9 * max(sizes) for size in sizes]
    # The true gradient of the keys' bias is zero: a constant along a row cancels in the softmax.
    assert sum(cancelled) in (0, 2)
    for ours, is_nothing in zip(gradients, cancelled, strict=True):
        assert not is_nothing or ours.abs().max() < 1e-6 * max(sizes)
    pairs = zip(gradients, sizes, cancelled, strict=True)
    return torch.cat([(ours / size).flatten().to(ours.dtype) for ours, size, is_nothing in pairs if not is_nothing])


MODELS = [*(("SD", library) for library in LIBRARIES), ("FLUX: no quant_conv", "diffusers"), ("FLUX.2", "diffusers")]
MODELS += [("CogView: no attention, two residual blocks", "fastvae"), ("128 channels", "fastvae")]
CASES = [(*model, checkpointing) for model in MODELS for checkpointing in (False, True)]
# With checkpointing the short run trains in tests/swap_in/test_transformations.py.
SHORT = [("SD", "fastvae", False)]


@pytest.mark.parametrize(("shape", "library", "checkpointing"), short_run(CASES, SHORT))
def test_gradients_are_those_of_eager(shape, library, checkpointing):
    vae = small_model(shape, library).requires_grad_(True).train()
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
    """Nothing computed in an earlier step is kept: training uses the current parameters."""
    vae = fastvae.accelerate(smallest_model(**FEWEST), freeze=True).requires_grad_(True)
    x = pixels(vae, batch=1, height=4, width=4)
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-3)
    before, _ = step(vae, x)
    optimizer.step()
    after = vae(x).sample
    assert not torch.equal(before, after)


def test_the_gradient_of_an_input_goes_through_a_frozen_model():
    """As for guidance by a loss on pixels: only the latents require a gradient."""
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
    vae = fastvae.accelerate(smallest_model())
    x = pixels(vae, batch=1, height=8, width=8)
    assert torch.is_grad_enabled()
    assert not vae.encode(x).latent_dist.parameters.requires_grad
    assert {row.path for row in fastvae.explain(vae).rows} == {"fused"}


HOOKED = ("down_blocks.0.resnets.0", "down_blocks.1", "mid_block.resnets.1")


@pytest.mark.parametrize(
    ("where", "devices"),
    short_run(
        [(where, devices) for where in HOOKED for devices in (("cpu",), ())],
        [("down_blocks.0.resnets.0", ("cpu",)), ("mid_block.resnets.1", ())],
    ),
    ids=str,
)
def test_a_gradient_that_a_hook_asks_for_is_eagers(where, devices, monkeypatch):
    """Only a tensor that a hook adds requires a gradient, as in guidance and control."""
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
