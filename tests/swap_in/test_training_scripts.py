"""Uses of a VAE in diffusers' training scripts: accelerated, stock, and in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from swap_in.tiny_parts import autoencoder, ddim, sixteen_latents, unet
from torch import Tensor, nn

import fastvae
from fastvae.fast import fallback_reasons
from fastvae.fast.cpu.cpu_pass import CpuPass
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.training_pass import TrainingPass


@pytest.fixture(params=["a user's CPU", "fused kernels"], autouse=True)
def passes(request, monkeypatch):
    """Run on a CPU's operators or on fused kernels; return the set of passes taken: "inference", "training"."""
    if request.param == "fused kernels":
        if "cpu" not in fallback_reasons.KERNEL_DEVICES:
            pytest.skip("no interpreter, so that kernels run on a GPU alone")
    else:
        monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    taken: set[str] = set()

    def recorded(begin, name):
        return lambda *args: taken.add(name) or begin(*args)

    for kind, name in ((InferencePass, "inference"), (CpuPass, "inference"), (TrainingPass, "training")):
        monkeypatch.setattr(kind, "begin", recorded(kind.begin, name))
    return taken


# For results that do not depend on the pass: the interpreter takes ten seconds a step.
ON_A_USERS_CPU = pytest.mark.parametrize("passes", ["a user's CPU"], indirect=True)


def models(build: Callable[[], nn.Module] = autoencoder, **settings: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return an accelerated VAE of diffusers', its stock copy in channels_last, and a float64 copy."""
    torch.manual_seed(0)
    vae = build().requires_grad_(False)
    stock = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    return fastvae.accelerate(vae, **settings), stock, copy.deepcopy(vae).double()


def batch(rows: int = 2, seed: int = 1, side: int = 8) -> Tensor:
    """Return pixels [rows, 3, side, side] in [-1, 1]."""
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def like(x: Tensor, vae: nn.Module) -> Tensor:
    return x.to(next(vae.parameters()).dtype)


def saved_by_autograd(function) -> list[Tensor]:
    """Return the tensors that a call saves for a backward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function()
    return kept


def whitened(gradients: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Return gradients as one vector, each divided by the size of the true one.

    Gradients that are zero in truth are left out: a bias of all keys cancels in the softmax.
    """
    sizes = [exact.square().mean().sqrt() for exact in truth]
    pairs = [pair for pair in zip(gradients, sizes, strict=True) if pair[1] > 1e-9 * max(sizes)]
    assert len(pairs) >= len(gradients) - 2
    return torch.cat([(gradient / size).flatten().to(gradient.dtype) for gradient, size in pairs])


class Features(nn.Module):
    """A small network as LPIPS': distance between the normalised features of two images, from frozen layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)])
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of a and b, both [B, 3, H, W]."""
        distance = a.new_zeros(())
        for layer in self.layers:
            a, b = layer(a).tanh(), layer(b).tanh()
            distance = distance + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().mean()
        return distance


# Encoding in the loop: frozen weights, with grad mode on as in the scripts.


def latents_of(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Return latents by the line that the scripts use."""
    return vae.encode(pixels.to(dtype=vae.dtype)).latent_dist.sample() * vae.config.scaling_factor


def exact_latents(vae: nn.Module, pixels: Tensor, seed: int) -> Tensor:
    """Return the same latents in float64, with the noise of float32."""
    posterior = vae.encode(pixels.double()).latent_dist
    torch.manual_seed(seed)
    noise = torch.randn(posterior.mean.shape)
    return (posterior.mean + posterior.std * noise.double()) * vae.config.scaling_factor


WAYS = {
    "frozen, grad mode on": (False, torch.enable_grad),
    "trainable under no_grad": (True, torch.no_grad),
    "trainable in inference mode": (True, torch.inference_mode),
}


PASSES = ("a user's CPU", "fused kernels")


@pytest.mark.parametrize(
    ("way", "passes"),
    short_run(
        [(way, name) for way in WAYS for name in PASSES],
        [*((way, "a user's CPU") for way in WAYS), ("frozen, grad mode on", "fused kernels")],
    ),
    indirect=["passes"],
)
def test_encoding_keeps_no_graph_and_draws_as_stock(way, passes):
    trainable, mode = WAYS[way]
    ours, stock, exact = models()
    ours.requires_grad_(trainable).train(trainable)
    pixels = batch()
    drawn, states = [], []

    def draw(vae):
        torch.manual_seed(3)
        drawn.append(latents_of(vae, pixels))
        states.append(torch.get_rng_state())

    with mode():
        assert not saved_by_autograd(lambda: draw(ours))
        draw(stock)
    assert passes == {"inference"}
    assert_as_accurate(*drawn, exact_latents(exact, pixels, seed=3))
    assert torch.equal(*states), "the generator must stand where stock leaves it"
    assert drawn[0].grad_fn is None
    assert not drawn[0].requires_grad


def test_a_trainable_encoder_keeps_what_backward_needs():
    """Counterpart of the test above: tensors are saved when a gradient is needed."""
    ours, *_ = models()
    ours.requires_grad_(True)
    assert saved_by_autograd(lambda: ours.encode(batch(1)).latent_dist.sample())


def denoising_gradient(net: nn.Module, latents: Tensor) -> Tensor:
    """Run one step of text-to-image training: add noise, predict the noise, return the loss.

    The gradient of all weights as one vector. In float64: a UNet's own rounding is larger than what comes of a VAE's.
    """
    net, latents = copy.deepcopy(net).double(), latents.double()
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(latents.shape, generator=generator).double()
    words = torch.randn(len(latents), 5, 32, generator=generator).double()
    times = torch.tensor([10, 700])
    noisy = ddim().add_noise(latents, noise, times)
    F.mse_loss(net(noisy, times, words).sample, noise).backward()
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


@pytest.mark.parametrize("passes", short_run(PASSES, PASSES[:1]), indirect=True)
def test_a_step_of_text_to_image_training_gives_stocks_gradient():
    ours, stock, exact = models()
    net, gradients = unet(), []
    for vae in (ours, stock):
        torch.manual_seed(3)
        gradients.append(denoising_gradient(net, latents_of(vae, batch())).float())
    truth = denoising_gradient(net, exact_latents(exact, batch(), seed=3))
    assert_as_accurate(*gradients, truth)
    assert all(weight.grad is None for weight in ours.parameters())


# DreamBooth with --cache_latents: posteriors are kept, the VAE is deleted, and every step draws a sample.


@pytest.mark.parametrize(
    ("passes", "freeze"),
    [
        pytest.param("a user's CPU", False, id="a user's CPU"),
        pytest.param("a user's CPU", True, id="a user's CPU, freeze"),
        pytest.param("fused kernels", False, id="fused kernels", marks=pytest.mark.slow),
        pytest.param("fused kernels", True, id="fused kernels, freeze", marks=pytest.mark.slow),
    ],
    indirect=["passes"],
)
def test_posteriors_kept_over_steps_stay_what_they_were(freeze):
    """FLUX's VAE: without quant_conv the encoder's own output is kept."""
    ours, *_ = models(sixteen_latents, freeze=freeze)
    factor = ours.config.scaling_factor
    cache, at_once = [], []
    for step in range(3):
        pixels = batch(1, seed=step)
        cache.append(ours.encode(pixels).latent_dist)
        at_once.append((cache[-1].parameters.clone(), cache[-1].std.clone()))
        pixels.zero_()  # a loader's memory is used again
    ours.decode(cache[0].mean)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    fastvae.restore(ours)
    del ours
    assert len({posterior.parameters.untyped_storage().data_ptr() for posterior in cache}) == len(cache)
    for epoch in range(2):
        for number, posterior in enumerate(cache):
            moments, std = at_once[number]
            assert torch.equal(posterior.parameters, moments), (epoch, number)
            drawn = posterior.sample(torch.Generator().manual_seed(epoch)) * factor
            noise = torch.randn(std.shape, generator=torch.Generator().manual_seed(epoch))
            assert torch.equal(drawn, (moments.chunk(2, dim=1)[0] + std * noise) * factor), (epoch, number)
            drawn.zero_()


# Losses on pixels through decode, as in reward and LPIPS fine-tuning.


@pytest.mark.parametrize(
    ("passes", "checkpointing"),
    [
        pytest.param("a user's CPU", False, id="a user's CPU"),
        pytest.param("a user's CPU", True, id="a user's CPU, gradient checkpointing"),
        pytest.param("fused kernels", False, id="fused kernels", marks=pytest.mark.slow),
        pytest.param("fused kernels", True, id="fused kernels, gradient checkpointing", marks=pytest.mark.slow),
    ],
    indirect=["passes"],
)
def test_a_loss_on_pixels_goes_back_through_a_frozen_decoder(checkpointing, passes):
    """Gradients of the network that made the latents, and none of the VAE's weights."""
    torch.manual_seed(5)
    maker, distance = nn.Conv2d(4, 4, 3, padding=1), Features()
    target, noise = batch(1), torch.randn(1, 4, 4, 4)
    pictures, gradients = [], []
    for vae in models():
        if checkpointing:
            vae.enable_gradient_checkpointing()
            vae.train()
        net = copy.deepcopy(maker).to(vae.dtype)
        z = net(like(noise, vae))
        picture = vae.decode(z / vae.config.scaling_factor).sample
        assert picture.requires_grad
        (copy.deepcopy(distance).to(vae.dtype)(picture, like(target, vae)) * 10 + picture.square().mean()).backward()
        assert all(weight.grad is None for weight in vae.parameters())
        pictures.append(picture.detach())
        gradients.append([weight.grad for weight in net.parameters()])
    assert passes <= {"training"}
    assert_as_accurate(*pictures)
    assert_as_accurate(*[whitened(one, gradients[2]) for one in gradients])


# Training the VAE itself.


def vae_step(vae: nn.Module, pixels: Tensor, distance: nn.Module) -> list[Tensor]:
    """Gradients of pixel, LPIPS and KL losses, after those of the last layer, which weigh a discriminator."""
    posterior = vae.encode(like(pixels, vae)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(6))
    picture = vae.decode(posterior.mean + posterior.std * like(noise, vae)).sample
    loss = F.mse_loss(picture, like(pixels, vae), reduction="sum") + distance.to(vae.dtype)(picture, like(pixels, vae))
    last = vae.decoder.conv_out.weight
    weight = torch.autograd.grad(loss, last, retain_graph=True)[0].norm().detach()
    (loss + 1e-3 * weight * picture.mean() + 1e-6 * posterior.kl().sum()).backward()
    return [parameter.grad for parameter in vae.parameters()]


@pytest.mark.parametrize(
    ("checkpointing", "passes", "blocks"),
    short_run(
        [
            (True, "fused kernels", 1),
            *((checkpointing, name, 2) for checkpointing in (False, True) for name in PASSES),
        ],
        [(True, "fused kernels", 1)],
    ),
    indirect=["passes"],
)
def test_a_step_of_vae_training_gives_stocks_gradients(checkpointing, passes, blocks):
    torch.manual_seed(5)
    distance = Features()
    gradients = []
    trained = models(lambda: autoencoder(blocks))
    for vae in trained:
        vae.requires_grad_(True).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        gradients.append(vae_step(vae, batch(1), copy.deepcopy(distance)))
    assert passes <= {"training"}
    assert_as_accurate(*[whitened(one, gradients[2]) for one in gradients])


@ON_A_USERS_CPU
def test_the_step_after_is_taken_from_the_weights_that_it_left():
    """Nothing computed from the old weights outlives the optimizer's write."""
    ours, *_ = models()
    ours.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    pixels, pictures = batch(1), []
    for _ in range(2):
        picture = ours(pixels).sample
        F.mse_loss(picture, pixels).backward()
        pictures.append(picture.detach())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        pictures.append(ours(pixels).sample)
        stock = fastvae.restore(copy.deepcopy(ours)).to(memory_format=torch.channels_last)
        exact = fastvae.restore(copy.deepcopy(ours)).double()
        assert_as_accurate(pictures[2], stock(pixels).sample, exact(pixels.double()).sample)
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[1], pictures[2])


@ON_A_USERS_CPU
def test_gradient_checkpointing_keeps_less():
    ours, *_ = models()
    ours.requires_grad_(True).train()
    sizes = []
    for checkpointing in (False, True):
        (ours.enable_gradient_checkpointing if checkpointing else ours.disable_gradient_checkpointing)()
        sizes.append(sum(x.nbytes for x in saved_by_autograd(lambda: ours(batch(1)).sample)))
    assert sizes[1] < sizes[0] / 2, sizes
