"""The pass on a CPU, without fused kernels: torch's operators with reused memory, as accurate as eager."""

import copy
import itertools

import pytest
import torch
from fast.small_models import CONFIGS, LIBRARIES, latents, pixels, small_model, smallest_model
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from support.small_store import small_vae
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastvae
from fastvae.data.encoding.model import open_model
from fastvae.fast.cpu import cpu_pass
from fastvae.fast.fallback_reasons import Reason
from fastvae.report.contestants import images

pytestmark = pytest.mark.usefixtures("users_cpu")


def both_ways(vae, x, z):
    """Return moments and images."""
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


def in_channels_last(*values):
    return [copy.deepcopy(value).to(memory_format=torch.channels_last) for value in values]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {(shape, "fastvae", torch.float32, "oneDNN") for shape in CONFIGS}
SHORT |= {("SD", "diffusers", dtype, "no oneDNN") for dtype in DTYPES}
SHORT |= {("SD", "diffusers", torch.float16, "oneDNN"), ("FLUX.2", "diffusers", torch.bfloat16, "oneDNN")}


@pytest.mark.parametrize(
    ("shape", "library", "dtype", "onednn"),
    short_run(itertools.product(CONFIGS, LIBRARIES, DTYPES, ("oneDNN", "no oneDNN")), SHORT),
    ids=str,
)
def test_a_cpu_is_as_accurate_as_eager(shape, library, dtype, onednn, monkeypatch):
    if onednn == "no oneDNN":
        for module in ("packed_weights", "cpu.cpu_pass"):
            monkeypatch.setattr(f"fastvae.fast.{module}.takes_onednn", lambda weight: False)
    vae = small_model(shape, library).to(dtype)
    x, z = pixels(vae), latents(vae)
    eager = both_ways(*in_channels_last(vae, x, z))
    truth = both_ways(copy.deepcopy(vae).double(), x.double(), z.double())
    given = x.clone(), z.clone()
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    for freeze in (False, True):
        fastvae.accelerate(vae, freeze=freeze)
        for again in range(2):
            ours = both_ways(vae, x, z)
            for one, plain, exact in zip(ours, eager, truth, strict=True):
                assert one.is_contiguous(), (freeze, again)
                assert_as_accurate(one, plain, exact)
        assert set(fastvae.explain(vae).reasons.values()) == {Reason.CPU}
        assert (fastvae.fast_report(vae)["packed_bytes"] > 0) == freeze
    assert torch.equal(x, given[0])
    assert torch.equal(z, given[1])
    assert all(torch.equal(weight, weights[name]) for name, weight in vae.state_dict().items())


@pytest.mark.parametrize("side", [32, 64])
def test_the_embedded_model_with_frozen_weights_is_as_accurate_as_eager(side):
    """Trained weights, in the layouts that oneDNN chooses for images of a few pixels."""
    stock = open_model("tiny").eval().requires_grad_(False)
    wide, fast = copy.deepcopy(stock).double(), fastvae.accelerate(copy.deepcopy(stock), freeze=True)
    for x in (images(stock, side, 1), torch.ones(1, 3, side, side)):
        z = stock.encode(x).latent_dist.mean
        results = [both_ways(vae, x.to(vae.dtype), z.to(vae.dtype)) for vae in (fast, stock, wide)]
        for ours, eager, truth in zip(*results, strict=True):
            assert_as_accurate(ours, eager, truth)


@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
def test_weights_that_do_not_lie_in_one_piece_are_read_as_they_are(freeze):
    """Views of a larger tensor, as an assigned checkpoint may contain."""
    vae = small_model("SD")
    expected = both_ways(*in_channels_last(vae, pixels(vae), latents(vae)))
    for weight in vae.parameters():
        weight.data = torch.stack([weight.data, torch.full_like(weight.data, 1e4)], dim=-1)[..., 0]
    assert not vae.encoder.conv_in.bias.is_contiguous()
    ours = both_ways(fastvae.accelerate(vae, freeze=freeze), pixels(vae), latents(vae))
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_hook_kept_is_not_written_into(library):
    vae = fastvae.accelerate(small_model("SD", library))
    x, z = pixels(vae), latents(vae)
    kept, copies = [], []

    def keep(module, given, result):
        for value in (given[0], result):
            kept.append(value)
            copies.append(value.clone())

    names = ("encoder.down_blocks.0.resnets.0", "encoder.mid_block.attentions.0", "decoder.up_blocks.0", "quant_conv")
    for name in names:
        vae.get_submodule(name).register_forward_hook(keep)
    both_ways(vae, x, z)
    assert len(kept) == 2 * len(names)
    assert all(torch.equal(value, copy) for value, copy in zip(kept, copies, strict=True))


def test_memory_of_one_dtype_is_not_that_of_another():
    """A block in bf16 between blocks in fp32: hooks cast before and behind it."""
    vae = small_vae().requires_grad_(False)
    blocks = vae.encoder.down_blocks
    blocks[2].bfloat16()
    x = pixels(vae)
    truth = copy.deepcopy(vae).double().encode(x.double()).latent_dist.parameters
    blocks[1].register_forward_hook(lambda module, given, result: result.bfloat16())
    blocks[3].register_forward_pre_hook(lambda module, given: (given[0].float(), *given[1:]))
    eager = in_channels_last(vae)[0].encode(x).latent_dist.parameters
    assert_as_accurate(fastvae.accelerate(vae).encode(x).latent_dist.parameters, eager, truth)


def test_an_identity_that_gives_its_input_back_is_not_written_into():
    """A module that is not ours may return its input tensor itself."""
    vae = small_model("CogView: no attention, two residual blocks")
    seen = []

    class Seen(torch.nn.Module):
        def forward(self, x, temb=None):
            seen.append((x, x.clone()))
            return x

    vae.encoder.down_blocks[0].resnets[1] = Seen()
    vae.encoder.mid_block.resnets[0] = Seen()
    expected = in_channels_last(vae)[0].encode(pixels(vae)).latent_dist.parameters
    seen.clear()
    ours = fastvae.accelerate(vae).encode(pixels(vae)).latent_dist.parameters
    assert len(seen) == 2
    assert all(torch.equal(*pair) for pair in seen)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_a_gradient_and_restore_are_the_modules_own():
    vae = small_model("SD")
    plain = both_ways(vae, pixels(vae), latents(vae))
    fastvae.accelerate(vae).requires_grad_(True)
    vae(pixels(vae)).sample.sum().backward()
    assert all(weight.grad is not None for weight in vae.encoder.parameters())
    vae.requires_grad_(False)
    fastvae.restore(vae)
    assert all(map(torch.equal, both_ways(vae, pixels(vae), latents(vae)), plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_rows_are_those_of_images_alone(dtype):
    vae = fastvae.accelerate(small_model("SD").to(dtype), deterministic=True)
    x, z = pixels(vae, batch=3, height=64, width=48), latents(vae, batch=3, height=9, width=7)
    together = both_ways(vae, x, z)
    alone = zip(*(both_ways(vae, x[row : row + 1], z[row : row + 1]) for row in range(3)), strict=True)
    for whole, rows in zip(together, alone, strict=True):
        assert torch.equal(whole, torch.cat(rows))


def test_deterministic_latents_and_images_are_those_of_images_alone_in_a_large_batch():
    """From 24 images on oneDNN sums 1x1 convolutions in another order: quant_conv and post_quant_conv."""
    vae = fastvae.accelerate(small_vae(), deterministic=True)
    x = torch.rand(24, 3, 64, 64) * 2 - 1
    z = fastvae.encode_latents(vae, x, posterior="mode")
    assert torch.equal(z, torch.cat([fastvae.encode_latents(vae, row, posterior="mode") for row in x.split(1)]))
    images = fastvae.decode_latents(vae, z)
    assert torch.equal(images, torch.cat([fastvae.decode_latents(vae, row) for row in z.split(1)]))


def test_deterministic_rows_do_not_depend_on_where_they_begin_in_memory():
    """MKL's products of few channels do: images of 10 channels of 17 x 3 pixels begin at any multiple of 8 bytes."""
    one = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = small_vae(latent_channels=10, block_out_channels=(8,), layers_per_block=1, **one)
    fastvae.accelerate(vae, deterministic=True)
    z = torch.randn(4, 10, 17, 3).contiguous(memory_format=torch.channels_last)
    together = fastvae.decode_latents(vae, z, output="float")
    for row in range(4):
        alone = torch.empty_like(z[row : row + 1]).copy_(z[row : row + 1])
        for given in (alone, z[row : row + 1]):
            assert torch.equal(fastvae.decode_latents(vae, given, output="float"), together[row : row + 1]), row


def test_an_empty_batch_and_a_trace_are_torchs_own():
    """Exporters read the trace and support only torch's operators."""
    vae = fastvae.accelerate(small_model("SD"))
    assert vae.encode(pixels(vae)[:0]).latent_dist.parameters.shape[0] == 0
    trace = torch.jit.trace(vae.encoder, pixels(vae), check_trace=False)
    assert not [node.kind() for node in trace.inlined_graph.nodes() if "mkldnn" in node.kind()]


@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
def test_fake_tensors_and_symbolic_traces_are_torchs_own(freeze):
    """torch has no shape functions for oneDNN's operators."""
    vae = fastvae.accelerate(smallest_model(), freeze=freeze)
    x = pixels(vae)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = vae.encode(torch.empty(x.shape)).latent_dist.parameters.shape
    trace = make_fx(vae.encoder)(x)
    assert not [node for node in trace.graph.nodes if "mkldnn" in str(node.target)]
    assert vae.encode(x).latent_dist.parameters.isfinite().all()
    assert shape == vae.encode(x).latent_dist.parameters.shape


def test_this_torch_has_the_operators_by_their_names():
    """They are private in torch: this test fails for a release that removes them."""
    assert torch.backends.mkldnn.is_available()
    for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight"):
        assert hasattr(cpu_pass.ONEDNN, name), name
