"""fastvae.compare: stages of the network, their errors, and a wrong stage."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from fast.small_models import CONFIGS, latents, pixels, small_model
from PIL import Image
from support.small_store import picture, small_vae

import fastvae
from fastvae.data.images.errors import ImageError
from fastvae.fast.cpu import cpu_pass
from fastvae.fast.cpu.group_norm import AccurateGroupNorm
from fastvae.fast.fast_path import FastPath
from fastvae.metrics import psnr
from fastvae.report import compare_stages
from fastvae.report.compare import Comparison
from fastvae.system.strict_json import strict_json

pytestmark = pytest.mark.usefixtures("as_a_users_cpu")

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block"]
NAMES = [
    *(f"encoder.{name}" for name in ("conv_in", *BLOCKS, "conv_out")),
    "quant_conv", "posterior.mean", "posterior.std", "post_quant_conv",
    *(f"decoder.{name}" for name in ("conv_in", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out")),
]  # fmt: skip


def by_name(found: Comparison):
    return {stage.name: stage for stage in found.stages}


def last_of(vae, x, path):
    with torch.no_grad():
        return {name: values.clone() for name, values in compare_stages.run_stages(vae, x, path)}


@pytest.mark.parametrize("hand", ["fastvae", "diffusers"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_the_stages_end_in_what_the_model_gives(hand, shape):
    """Bit for bit, on the fast path and in eager torch."""
    vae = small_model(shape, hand)
    x = pixels(vae, 1)
    for path in (None, FastPath(deterministic=False, graphs=False, freeze=False)):
        if path is not None:
            fastvae.accelerate(vae)
        found = last_of(vae, x, path)
        posterior = vae.encode(x).latent_dist
        assert torch.equal(found["posterior.mean"], posterior.mean)
        assert torch.equal(found["posterior.std"], posterior.std)
        assert torch.equal(found["decoder.conv_out"], vae.decode(posterior.mode().contiguous()).sample)


@pytest.mark.parametrize("hand", ["fastvae", "diffusers"])
def test_every_stage_has_its_errors(hand):
    vae = small_model("SD", hand).to(torch.bfloat16)
    x = pixels(vae, 2)
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    found = fastvae.compare(SimpleNamespace(vae=vae), x)
    assert [stage.name for stage in found.stages] == NAMES
    assert found.is_right
    assert (found.images, found.dtype, found.device) == (2, "bfloat16", "cpu")
    assert {stage.path for stage in found.stages if "coder" in stage.name} == {"cpu"}
    for stage in found.stages:
        for pair in (stage.fast_float64, stage.eager_float64):
            assert 0 < pair.mean <= pair.rms <= pair.largest < 1
            assert 0 < pair.cosine < 1e-3
    assert "_fastvae" not in vars(vae)
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())


def test_the_errors_are_those_of_the_definition():
    """Compute one stage here: two images as one activation."""
    vae = small_model("SD").to(torch.bfloat16)
    x = pixels(vae, 2)
    fast = fastvae.accelerate(copy.deepcopy(vae))
    with torch.no_grad():
        ours = torch.cat([fast.encode(row).latent_dist.parameters for row in x.split(1)]).double()
        plain = torch.cat([vae.encode(row).latent_dist.parameters for row in x.split(1)]).double()
        truth = copy.deepcopy(vae).double().encode(x.double()).latent_dist.parameters
    stage = by_name(fastvae.compare(vae, x))["quant_conv"]
    for pair, a, b in ((stage.fast_eager, ours, plain), (stage.fast_float64, ours, truth)):
        assert pair.largest == pytest.approx(float((a - b).abs().max()))
        assert pair.mean == pytest.approx(float((a - b).abs().mean()))
        assert pair.rms == pytest.approx(float((a - b).square().mean().sqrt()))
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert pair.cosine == pytest.approx(1 - float(cosine), rel=1e-3)
        with AccurateGroupNorm():
            laid_out = [vae.encode(row.contiguous(memory_format=torch.channels_last)) for row in x.split(1)]
    other = torch.cat([one.latent_dist.parameters for one in laid_out]).double()
    eps, error = torch.finfo(torch.bfloat16).eps, max((plain - truth).abs().max(), (other - truth).abs().max())
    assert stage.allowed == pytest.approx(float(2 * error + eps * truth.abs().max()))


def test_psnr_is_that_of_the_round_trip():
    vae = small_vae()
    x = fastvae.latents.pixels.pixels_from_images(vae, [picture(0, 32, 32)])
    found = fastvae.compare(vae, x)
    with torch.no_grad():
        image = vae.decode(vae.encode(x).latent_dist.mode()).sample
    as_bytes = [((y.clamp(-1, 1) + 1) * 127.5).numpy() for y in (image, x)]
    # metrics.psnr takes the range of uint8, and other dtypes in that range.
    assert found.psnr["eager"] == pytest.approx(psnr(*as_bytes), rel=1e-5)
    assert found.psnr["fast"] == pytest.approx(found.psnr["float64"], rel=1e-4)


def test_the_settings_of_an_accelerated_model_are_compared():
    vae = fastvae.accelerate(small_model("SD"), "exact")
    found = fastvae.compare(vae, pixels(vae, 1))
    assert all(stage.fast_eager.largest == 0 for stage in found.stages)
    assert by_name(found)["encoder.conv_in"].path.startswith("EXACT: ")
    assert "_fastvae" in vars(vae.encoder)


def test_a_wrong_fast_path_is_seen_from_its_stage_on(monkeypatch):
    vae = small_model("SD")
    own = cpu_pass.CpuPass.resnet

    def off(self, block, flow, pad):
        flow = own(self, block, flow, pad)
        return flow._replace(x=flow.x * 1.01) if block is vae.encoder.mid_block.resnets[0] else flow

    monkeypatch.setattr(cpu_pass.CpuPass, "resnet", off)
    found = fastvae.compare(vae, pixels(vae, 1))
    right = [stage.name for stage in found.stages if stage.is_right]
    assert right[:3] == NAMES[:3]
    assert "encoder.mid_block" not in right
    assert not found.is_right
    assert str(found).count("TOO FAR") == len(NAMES) - len(right)


def test_what_overflows_in_eager_must_be_finite_on_the_fast_path():
    vae = small_model("SD").half()
    vae.encoder.conv_in.weight.data.fill_(3e4)
    found = by_name(fastvae.compare(vae, pixels(vae, 1)))["encoder.conv_in"]
    assert math.isnan(found.eager_float64.largest)
    assert math.isnan(found.fast_float64.largest)
    assert not found.is_right


def test_stages_of_fused_passes_have_their_true_values(monkeypatch):
    """Fused passes hold fp16 times a power of two and add biases later: the stages undo both."""
    monkeypatch.undo()  # with the kernels, in the interpreter
    if "cpu" not in fastvae.fast.fallback_reasons.KERNEL_DEVICES:
        pytest.skip("no kernel runs here: TRITON_INTERPRET is not set")
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16), "norm_num_groups": 1, "layers_per_block": 1}
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = fastvae.AutoencoderKL(**small, **two).eval().requires_grad_(False).half()
    for weight in vae.parameters():
        if weight.ndim == 1:
            weight.data.add_(torch.randn(weight.shape) * 0.2)
    found = fastvae.compare(vae, torch.rand(1, 3, 8, 8) * 2 - 1)
    assert {stage.path for stage in found.stages if stage.name.startswith("encoder")} == {"fused"}
    assert found.is_right, str(found)


def test_a_part_of_another_shape_is_one_stage():
    vae = small_model("SD")
    vae.decoder = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1), torch.nn.Upsample(scale_factor=2)).requires_grad_(False)
    found = fastvae.compare(vae, pixels(vae, 1))
    assert [stage.name for stage in found.stages][-2:] == ["post_quant_conv", "decoder"]
    assert found.stages[-1].path.startswith("UNSUPPORTED_LAYER")
    assert found.is_right


def test_files_of_any_size_and_pictures(tmp_path):
    vae = small_vae()
    for name, size in (("a.png", (41, 33)), ("b.jpg", (24, 70))):
        picture(1, *size).save(tmp_path / name)
    found = fastvae.compare(vae, [tmp_path / "a.png", str(tmp_path / "b.jpg")])
    assert found.images == 2
    one = fastvae.compare(vae, tmp_path / "a.png")
    array = fastvae.compare(vae, [Image.open(tmp_path / "a.png").crop((0, 0, 40, 32))])
    assert one == array, "cropped at the right and the bottom"
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"c\.png"):
        fastvae.compare(vae, [tmp_path / "c.png"])


def test_text_and_data():
    found = fastvae.compare(small_vae(), [picture(0, 32, 32)])
    lines = str(found).splitlines()
    assert lines[0] == "1 image, float32 on cpu; the largest, mean and cosine error of each pair"
    assert len(lines) == len(found.stages) + 3
    assert lines[2].startswith("encoder.conv_in ")
    assert lines[2].endswith("cpu")
    assert lines[-1].startswith("round trip, PSNR: fast ")
    facts = found.facts()
    assert facts["stages"][0]["fast_eager"]["largest"] == found.stages[0].fast_eager.largest
    assert facts["is_right"] is True
    assert strict_json(facts)


@pytest.mark.parametrize(
    ("change", "images", "words"),
    [
        (lambda vae: setattr(vae, "decoder", None), None, "vae must have its decoder, got AutoencoderKL with"),
        (lambda vae: vae.to("meta"), None, "weights in memory"),
        (lambda vae: None, torch.zeros(0, 3, 8, 8), "at least one image"),
        (lambda vae: None, torch.zeros(1, 3, 1, 8), "at least 2 x 2 pixels, got "),
        (lambda vae: None, torch.zeros(1, 4, 8, 8), "3 channels"),
    ],
    ids=["half a model", "meta", "no image", "too small", "another number of colours"],
)
def test_what_cannot_be_compared_is_refused(change, images, words):
    vae = small_model("SD")
    x = pixels(vae, 1) if images is None else images
    change(vae)
    with pytest.raises(ValueError, match=words):
        fastvae.compare(vae, x)
    assert latents(vae).shape[1] == 4 if images is not None else True
