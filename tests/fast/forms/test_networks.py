"""The forms in whole networks: accuracy, packed bytes, costs, and bits that do not depend on the batch."""

import pytest
import torch
from fast.small_models import FEWEST, latents, pixels, small_model, smallest_model
from fastvae_kernels import attention, group_norm, interleave, residual, winograd
from fastvae_kernels import pixels as pixels_op
from support.short_run import short_run

import fastvae
from fastvae.fast import inference_pass
from fastvae.fast.accelerate import path_of
from fastvae.fast.forms.form import Entry, Form, Forms
from fastvae.report.correctness import truth_of

# A form, and a dtype in which its error stays within the tolerance in every network; `fastvae tune` tries the others.
WITHIN = [
    (Form.WINOGRAD4, torch.bfloat16),
    (Form.WINOGRAD2, torch.bfloat16),
    (Form.WINOGRAD2, torch.float16),
    (Form.WINOGRAD2, torch.float32),
    (Form.FOUR_TAPS, torch.bfloat16),
    (Form.FOUR_TAPS, torch.float16),
    (Form.FOUR_TAPS, torch.float32),
]
STRUCTURES = ("SD", "FLUX: no quant_conv", "CogView: no attention, two residual blocks", "128 channels")
CASES = [(structure, *pair) for structure in STRUCTURES for pair in WITHIN]
KEPT = [("SD", *WITHIN[0]), ("FLUX: no quant_conv", *WITHIN[2]), ("SD", *WITHIN[4])]


REFERENCES = {
    "pixels_conv_in": pixels_op.reference,
    "group_norm_statistics": group_norm.statistics_reference,
    "group_norm_affine": group_norm.affine_reference,
    "scale_shift": group_norm.scale_shift_reference,
    "scale_shift_silu": group_norm.scale_shift_silu_reference,
    "residual_add": residual.reference,
    "spatial_attention": attention.reference,
    "spatial_attention_shared": lambda query, x, scale: attention.reference(query, x, x, scale),
    "upsample_interleave": interleave.reference,
    "winograd_conv": winograd.reference,
}


@pytest.fixture
def by_reference(monkeypatch):
    """Compute every op by its reference: a hundred times as fast as the interpreter; tests/ops compares both."""
    for name, reference in REFERENCES.items():
        monkeypatch.setattr(inference_pass, name, reference)


def with_form(vae, form, **options):
    """Return the model, frozen and accelerated, with all convolutions in this form that have it."""
    fastvae.accelerate(vae, freeze=True, **options)
    path_of(vae).forms = Forms(otherwise=form)
    return vae


def moments_of(vae, x):
    return vae.encode(x).latent_dist.parameters


def images_of(vae, z):
    return vae.decode(z).sample


def hold_to_tolerance(vae, x, z, form, record):
    """Check both parts of a model against eager and float64, and record their errors as shares of the allowed ones."""
    tasks = {"encode": (moments_of, x), "decode": (images_of, z)}
    truths = {task: truth_of(vae, task, given) for task, (_, given) in tasks.items()}
    with_form(vae, form)
    for task, (call, given) in tasks.items():
        y, truth = call(vae, given), truths[task]
        errors, allowed = truth.errors(y), (truth.allowed, truth.allowed_rms)
        record(
            f"{task}: largest and rms error as shares of the allowed",
            [e / a for e, a in zip(errors, allowed, strict=True)],
        )
        assert truth.judge(y)[2] is None, (task, errors, allowed)


@pytest.mark.parametrize(("structure", "form", "dtype"), short_run(CASES, KEPT), ids=str)
def test_a_network_is_as_accurate_as_eager(structure, form, dtype, by_reference, record_property):
    """Sizes that leave half tiles, blocks with a shortcut, a downsample's padding, and fp16's factors."""
    vae = small_model(structure).to(dtype)
    hold_to_tolerance(vae, pixels(vae, 1, 10, 6), latents(vae, 1, 4, 3), form, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), WITHIN, ids=str)
@pytest.mark.parametrize("model", ["tiny", "sd15"])
def test_real_widths_are_as_accurate_as_eager(model, form, dtype, by_reference, record_property):
    """The embedded trained model at 128², and SD's channels with random weights at 64²."""
    vae = (
        fastvae.AutoencoderKL.from_pretrained("tiny") if model == "tiny" else fastvae.AutoencoderKL.from_preset("sd15")
    )
    vae, side = vae.eval().requires_grad_(False).to(dtype), 128 if model == "tiny" else 64
    hold_to_tolerance(vae, pixels(vae, 1, side, side), latents(vae, 1, side // 8, side // 8), form, record_property)


def test_kernels_and_reference_agree_in_a_network(monkeypatch):
    vae = with_form(smallest_model(**FEWEST), Form.WINOGRAD2)
    x = pixels(vae, 1, 2, 5)
    ours = moments_of(vae, x)
    monkeypatch.setattr(inference_pass, "winograd_conv", winograd.reference)
    assert (ours - moments_of(vae, x)).abs().max() < 1e-5 * ours.abs().max()
    path_of(vae).forms = Forms()
    assert not torch.equal(moments_of(vae, x), ours), "the forms are not used"


def test_rows_do_not_depend_on_their_batch(by_reference, monkeypatch):
    # Its reference is torch's convolution, whose bits depend on the batch.
    monkeypatch.setattr(inference_pass, "pixels_conv_in", pixels_op.pixels_conv_in)
    vae = with_form(smallest_model(**FEWEST), Form.WINOGRAD2, deterministic=True)
    x = pixels(vae, batch=3, height=4, width=6)
    assert torch.equal(moments_of(vae, x), torch.cat([moments_of(vae, row[None]) for row in x]))
    assert moments_of(vae, x[:0]).shape == (0, 8, 4, 6)


def test_layers_take_the_form_of_their_entry(by_reference, monkeypatch):
    """By channels and pixels; a trace and a model that is not frozen take the direct form."""
    called = []
    monkeypatch.setattr(inference_pass, "winograd_conv", lambda *given: called.append(1) or winograd.reference(*given))
    vae = fastvae.accelerate(smallest_model(**FEWEST), freeze=True)
    path_of(vae).forms = Forms([Entry("conv", 8, 8, "float32", 24, Form.WINOGRAD2)])
    moments_of(vae, pixels(vae, 1, 4, 5))
    assert not called
    moments_of(vae, pixels(vae, 1, 4, 6))
    assert len(called) == 6, "two convolutions in each of three residual blocks"


def test_transformed_weights_are_counted_and_dropped(by_reference):
    vae = with_form(smallest_model(**FEWEST), Form.WINOGRAD4)
    x = pixels(vae, 1, 4, 6)
    moments_of(vae, x)
    kept = fastvae.fast_report(vae)["packed_bytes"]
    assert kept >= 6 * 36 * 8 * 8 * 4
    moments_of(vae, x)
    assert fastvae.fast_report(vae)["packed_bytes"] == kept
    before = moments_of(vae, x)
    vae.encoder.mid_block.resnets[0].conv1.weight.data *= 2
    assert torch.equal(moments_of(vae, x), before)
    fastvae.refresh(vae)
    assert fastvae.fast_report(vae)["packed_bytes"] == 0
    assert not torch.equal(moments_of(vae, x), before)


def test_explain_counts_the_launches_of_each_strip():
    vae = with_form(smallest_model(**FEWEST), Form.WINOGRAD4)
    launches = fastvae.explain(vae, (1, 3, 8, 8)).launches["encoder"]
    assert launches["fastvae::winograd_conv"] == 6 * 3
    assert "fastvae::residual_add" not in launches


def decoder_blocks():
    """Return the smallest model with an upsampling convolution, without the encoder's middle and the attention."""
    return smallest_model(mid_block_add_attention=False)


def test_four_taps_by_kernels_and_by_reference_give_the_same_image(monkeypatch):
    vae = with_form(decoder_blocks(), Form.FOUR_TAPS)
    z = latents(vae, 1, 3, 2)
    ours = images_of(vae, z)
    called = []
    monkeypatch.setattr(
        inference_pass, "upsample_interleave", lambda phases: called.append(1) or interleave.reference(phases)
    )
    assert (ours - images_of(vae, z)).abs().max() < 1e-5 * ours.abs().max()
    path_of(vae).forms = Forms()
    images_of(vae, z)
    assert len(called) == 1


def test_images_by_four_taps_do_not_depend_on_their_batch(by_reference):
    vae = with_form(decoder_blocks(), Form.FOUR_TAPS, deterministic=True)
    z = latents(vae, 3, 3, 2)
    assert torch.equal(images_of(vae, z), torch.cat([images_of(vae, row[None]) for row in z]))
    assert images_of(vae, z[:0]).shape == (0, 3, 6, 4)


def test_an_upsampling_convolution_takes_the_form_of_its_entry(by_reference, monkeypatch):
    """By the pixels of its result; Winograd's forms, which no fused kernel has for it, are the direct one."""
    called = []
    monkeypatch.setattr(
        inference_pass, "upsample_interleave", lambda phases: called.append(1) or interleave.reference(phases)
    )
    vae = fastvae.accelerate(decoder_blocks(), freeze=True)
    for form, least, taken in ((Form.FOUR_TAPS, 24, 1), (Form.FOUR_TAPS, 25, 0), (Form.WINOGRAD4, 24, 0)):
        path_of(vae).forms = Forms([Entry("upsample", 16, 16, "float32", least, form)])
        images_of(vae, latents(vae, 1, 3, 2))
        assert len(called) == taken, (form, least)
        called.clear()


def test_explain_counts_the_interleaving_instead_of_a_pass_of_statistics():
    vae = with_form(decoder_blocks(), Form.FOUR_TAPS)
    taps = fastvae.explain(vae, (1, 3, 6, 4))
    path_of(vae).forms = Forms()
    direct = fastvae.explain(vae, (1, 3, 6, 4))
    assert taps.launches["decoder"]["fastvae::upsample_interleave"] == 1
    name = "fastvae::group_norm_statistics"
    assert taps.launches["decoder"][name] == direct.launches["decoder"][name] - 1
    assert {row.form for row in taps.forms} == {Form.DIRECT, Form.FOUR_TAPS}
