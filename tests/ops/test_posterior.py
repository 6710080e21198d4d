"""sample_posterior and kl_divergence: against float64, against diffusers, and the noise of a row by its seed alone."""

import pytest
import torch
from fastvae_kernels import divergence, posterior
from fastvae_kernels.divergence import kl_divergence
from fastvae_kernels.parts import moments as layout
from fastvae_kernels.posterior import sample_posterior
from fastvae_kernels.shared import philox
from support.accuracy import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# The fast sine of a GPU is off by a little more than numpy's.
NOISE_TOLERANCE = 2e-6 if DEVICE == "cpu" else 1e-5


def _moments(shape, dtype=torch.float32, form="NCHW", spread=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * spread
    return values.to(DEVICE, dtype).contiguous(memory_format=FORMS[form])


def _noise(shape, *drawn):
    """Return the kernel's noise in fp32: with mean 0 and log-variance 0 the sample is the noise."""
    return sample_posterior(torch.zeros(shape, device=DEVICE), *drawn)


def _seeds(*seeds):
    return philox.seed_tensor(seeds, DEVICE)


def _formula(moments, noise, shift, scale):
    """Return diffusers' sample, with its pipelines' shift and scale, in the dtype of the moments."""
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0))
    return _shifted(mean + std * noise.to(moments.dtype), shift, scale)


def _shifted(z, shift, scale):
    # A GPU keeps a Python number in fp32; a CPU rounds it to half precision first.
    wide = torch.promote_types(z.dtype, torch.float32)
    return ((z.to(wide) - shift).to(z.dtype).to(wide) * scale).to(z.dtype)


# The fault that the case shows: (rows, moments' channels, height, width), spread of the values
CASES = {
    "one element": ((1, 2, 1, 1), 1.0),
    "a whole block and 1": ((1, 2, 25, 41), 1.0),
    "L=3, odd sides: no power of two": ((3, 6, 7, 5), 1.0),
    "two blocks a row: row from program": ((2, 8, 17, 19), 1.0),
    "L=16 of FLUX": ((2, 32, 8, 9), 1.0),
    "clamped on both sides": ((2, 8, 8, 8), 25.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sample_against_float64(case, dtype, form):
    shape, spread = CASES[case]
    if dtype == torch.float16:
        spread = min(spread, 8.0)
    moments = _moments(shape, dtype, form, spread)
    seeds = _seeds(*range(shape[0]))
    noise = _noise(shape, seeds)
    ours = sample_posterior(moments, seeds, shift=0.1159, scale=0.3611)
    assert ours.is_contiguous(memory_format=FORMS[form])
    assert_as_accurate(
        ours, _formula(moments, noise, 0.1159, 0.3611), _formula(moments.double(), noise.double(), 0.1159, 0.3611)
    )


def test_half_precision_has_diffusers_roundings():
    """Noise, std, product, sum: each rounded to the dtype, so that all but a few elements have eager's bits."""
    for dtype in (torch.float16, torch.bfloat16):
        moments = _moments((2, 8, 32, 32), dtype)
        seeds = _seeds(1, 2)
        ours, eager = sample_posterior(moments, seeds), _formula(moments, _noise(moments.shape, seeds), 0.0, 1.0)
        assert (ours != eager).double().mean() < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_the_noise_of_an_element_is_the_twins_by_its_logical_index(form):
    moments = torch.zeros(2, 6, 19, 23, device=DEVICE).contiguous(memory_format=FORMS[form])
    drawn = sample_posterior(moments, _seeds(7, 2**64 - 3)).cpu()
    twin = philox.normals([7, 2**64 - 3], 3 * 19 * 23).view(2, 3, 19, 23)
    assert (drawn - twin).abs().max() < NOISE_TOLERANCE


def test_a_row_is_the_same_alone_in_a_batch_of_seven_permuted_in_fp16_and_in_nhwc():
    moments = _moments((7, 8, 9, 11))
    seeds = _seeds(*range(100, 107))
    latents = sample_posterior(moments, seeds)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4], device=DEVICE)
    assert torch.equal(sample_posterior(moments[order], seeds[order]), latents[order])
    for row in (0, 4):
        assert torch.equal(sample_posterior(moments[row : row + 1], seeds[row : row + 1])[0], latents[row])
    assert torch.equal(sample_posterior(moments.contiguous(memory_format=torch.channels_last), seeds), latents)
    zeros = torch.zeros_like(moments)
    noise = sample_posterior(zeros, seeds)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(sample_posterior(zeros.to(dtype), seeds), noise.to(dtype))


STREAMS = {
    "lane 0 alone": (8192, [24]),
    "four lanes, the last ragged": (256, [0]),
    "three iterations": (64, [4]),
    "a stream for each row": (64, [4, 400]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", STREAMS)
def test_stream_is_what_torch_draws_on_a_gpu(case, form):
    threads, offsets = STREAMS[case]
    rows, count = 2, 4 * 7 * 13
    seeds = list(range(2**63 + 1, 2**63 + 1 + len(offsets)))
    moments = torch.zeros(rows, 8, 7, 13, device=DEVICE).contiguous(memory_format=FORMS[form])
    drawn = sample_posterior(moments, _seeds(*seeds), torch.tensor(offsets, device=DEVICE), threads).cpu()
    if len(offsets) == 1:
        twin = philox.stream_normals(seeds[0], offsets[0], rows * count, threads)
    else:
        twin = torch.cat([philox.stream_normals(*both, count, threads) for both in zip(seeds, offsets, strict=True)])
    assert (drawn - twin.view_as(drawn)).abs().max() < NOISE_TOLERANCE


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's CUDA generator needs a GPU")
@pytest.mark.parametrize("count", [16_384, 131_072, 270_336, 270_337, 8_388_608])
def test_a_cuda_generator_gives_eagers_bits(count):
    shape = (1, 1, 1, count)
    properties = torch.cuda.get_device_properties(0)
    ours, theirs = (torch.Generator("cuda").manual_seed(2**63 + 9) for _ in range(2))
    for _ in range(2):
        seed, offset, threads = philox.reserve(
            ours, count, properties.multi_processor_count, properties.max_threads_per_multi_processor
        )
        drawn = _noise((1, 2, 1, count), _seeds(seed), torch.tensor([offset], device=DEVICE), threads)
        assert torch.equal(drawn, torch.randn(shape, generator=theirs, device="cuda"))
        assert ours.get_offset() == theirs.get_offset()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mode_is_the_mean_shifted_and_scaled(dtype, form):
    moments = _moments((2, 6, 5, 7), dtype, form)
    latents = sample_posterior(moments, None, shift=0.0609, scale=0.3611)
    assert torch.equal(latents, _shifted(moments[:, :3], 0.0609, 0.3611))
    assert latents.is_contiguous(memory_format=FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", ["rows", "stream", "mode"])
def test_gradient_against_float64(draw, dtype, form):
    shape = (2, 6, 9, 31)
    drawn = {
        "rows": (_seeds(1, 2),),
        "stream": (_seeds(1), torch.tensor([8], device=DEVICE), 128),
        "mode": (None,),
    }[draw]
    noise = _noise(shape, *drawn)
    moments = _moments(shape, dtype, form, spread=2.0)
    moments[0, 3, 0, 0], moments[0, 3, 0, 1] = -40.0, 30.0
    grad = torch.randn(2, 3, 9, 31, generator=torch.Generator().manual_seed(6)).to(DEVICE, dtype)
    results = []
    for wide, formula in (
        (dtype, lambda x: sample_posterior(x, *drawn, shift=0.1, scale=0.7)),
        (dtype, lambda x: _formula(x, noise, 0.1, 0.7)),
        (torch.float64, lambda x: _formula(x, noise.double(), 0.1, 0.7)),
    ):
        leaf = moments.to(wide, memory_format=torch.preserve_format).detach().requires_grad_()
        (result,) = torch.autograd.grad(formula(leaf), leaf, grad.to(wide))
        results.append(result)
    assert_as_accurate(*results)
    assert results[0][0, 3, 0, 0] == 0, "clamped below: no gradient"
    assert results[0][0, 3, 0, 1] == 0, "clamped above: no gradient"


def test_reference_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers.models.autoencoders.vae")
    moments = _moments((2, 8, 5, 6), spread=20.0).cpu()
    theirs = diffusers.DiagonalGaussianDistribution(moments)
    assert torch.equal(posterior.reference(moments, None), theirs.mode())
    noise = philox.normals([3, 4], 120).view(2, 4, 5, 6)
    assert torch.equal(posterior.reference(moments, torch.tensor([3, 4])), theirs.mean + theirs.std * noise)
    assert torch.allclose(divergence.reference(moments), theirs.kl(), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    {
        "one pair": (1, 2, 1, 1),
        "a ragged chunk": (2, 6, 7, 5),
        "three chunks": (2, 8, 41, 67),
    }.items(),
    ids=lambda case: case[0],
)
def test_divergence_and_its_gradient_against_float64(case, dtype, form):
    moments = _moments(case[1], dtype, form, spread=2.0)
    moments[0, -1, 0, 0] = 21.0  # clamped: counts as 20, and has no gradient
    grad = torch.rand(case[1][0], generator=torch.Generator().manual_seed(6)).to(DEVICE)
    values, grads = [], []
    for wide, function in (
        (dtype, kl_divergence),
        (dtype, divergence.reference),
        (torch.float64, divergence.reference),
    ):
        leaf = moments.to(wide).detach().requires_grad_()
        value = function(leaf)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value, leaf, grad.to(value.dtype))[0])
    assert values[0].dtype == torch.float32
    assert_as_accurate(*values)
    assert_as_accurate(*grads)
    assert grads[0][0, -1, 0, 0] == 0


def test_divergence_of_a_row_does_not_depend_on_the_batch():
    moments = _moments((7, 8, 41, 33))
    whole = kl_divergence(moments)
    assert torch.equal(torch.cat([kl_divergence(row[None]) for row in moments]), whole)
    standard = torch.zeros(1, 8, 3, 3, device=DEVICE)
    assert kl_divergence(standard).item() == 0.0


def test_nothing_is_written_past_the_end():
    moments = _moments((1, 2, 3, 5))
    buffer = torch.full((64,), 7.0, device=DEVICE)
    seeds = _seeds(1)
    rest = {"latents_ptr": buffer, "shift": 0.0, "scale": 1.0}
    layout.over_latents(posterior._sample_kernel, moments, seeds, None, 0, **rest)
    assert torch.equal(buffer[:15], posterior.launch(moments, seeds).flatten())
    assert (buffer[15:] == 7.0).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_batches_and_empty_pictures(rows):
    moments = torch.zeros(rows, 8, 0 if rows else 4, 4, device=DEVICE, requires_grad=True)
    latents = sample_posterior(moments, _seeds(*[1] * rows))
    assert latents.shape == (rows, 4, *moments.shape[2:])
    streams = _seeds(*[1] * rows), torch.zeros(rows, dtype=torch.int64, device=DEVICE), 256
    assert posterior.reference(moments, *streams).shape == latents.shape
    divergences = kl_divergence(moments)
    assert torch.equal(divergences, torch.zeros(rows, device=DEVICE))
    (grad,) = torch.autograd.grad(latents.sum() + divergences.sum(), moments)
    assert grad.shape == moments.shape


def test_any_strides_and_offsets_are_taken():
    whole = _moments((2, 9, 6, 11))
    for moments in (whole[:, 1:], whole[:, :8, ::2, 1:], whole[:, :8].transpose(2, 3)):
        plain = moments.clone(memory_format=torch.contiguous_format)
        assert torch.equal(sample_posterior(moments, _seeds(1, 2)), sample_posterior(plain, _seeds(1, 2)))
        assert torch.equal(kl_divergence(moments), kl_divergence(plain))


def test_other_arguments_are_refused():
    moments = _moments((2, 8, 3, 3))
    one = torch.tensor([4], device=DEVICE)
    for message, call in {
        r"moments must be \[N, 2L, h, w\], got shape \(2, 7, 3, 3\)": (moments[:, 1:], _seeds(1, 2)),
        "moments must be floating point, got torch.int64": (moments.long(), _seeds(1, 2)),
        "seeds must be int64, one for each of the 2 rows": (moments, _seeds(1)),
        r"got torch.float32 of shape \(2,\)": (moments, torch.zeros(2, device=DEVICE)),
        r"offsets must be int64, one for each seed.* of shape \(1,\) for 2 seeds": (moments, _seeds(1, 2), one, 256),
        "threads=0": (moments, _seeds(1), one, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            sample_posterior(*call)
    with pytest.raises(ValueError, match=r"moments must be floating point \[N, 2L, h, w\], got torch.float32 of shape"):
        kl_divergence(moments[0])


def test_op_and_launcher_give_the_same_bits():
    moments, seeds = _moments((2, 8, 5, 5), torch.bfloat16), _seeds(1, 2)
    latents = sample_posterior(moments, seeds, shift=0.1, scale=2.0)
    assert torch.equal(posterior.launch(moments, seeds, None, 0, 0.1, 2.0), latents)
    arguments = (latents, moments, seeds, None, 0, 2.0)
    assert torch.equal(posterior.launch_backward(*arguments), posterior.sample_posterior_backward(*arguments))
    value = kl_divergence(moments)
    assert torch.equal(divergence.launch(moments), value)
    assert torch.equal(divergence.launch_backward(value, moments), divergence.kl_divergence_backward(value, moments))


def test_opcheck():
    moments = _moments((2, 8, 3, 5)).requires_grad_()
    torch.library.opcheck(sample_posterior, (moments, _seeds(1, 2)), {"scale": 0.5})
    torch.library.opcheck(sample_posterior, (moments.to(memory_format=torch.channels_last).detach(), None))
    torch.library.opcheck(
        sample_posterior, (moments.half().detach().requires_grad_(), _seeds(1), _seeds(4), 256, 0.1, 0.2)
    )
    torch.library.opcheck(kl_divergence, (moments,))


def test_compiles_in_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(moments, seeds):
        return sample_posterior(moments, seeds, scale=0.2).square().sum() + kl_divergence(moments).sum()

    for side in (4, 7):
        moments, seeds = _moments((2, 8, side, 3)).requires_grad_(), _seeds(1, 2)
        compiled = torch.autograd.grad(loss(moments, seeds), moments)[0]
        plain = sample_posterior(moments, seeds, scale=0.2).square().sum() + kl_divergence(moments).sum()
        assert torch.equal(compiled, torch.autograd.grad(plain, moments)[0])


def test_cost_counts_the_tensors_it_names():
    moments, seeds = torch.empty(2, 8, 16, 16, dtype=torch.float16), torch.empty(2, dtype=torch.int64)
    assert posterior.cost(moments, seeds).bytes == 2 * (8 + 4) * 256 * 2 + 16
    assert posterior.cost(moments).bytes == 2 * (4 + 4) * 256 * 2
    assert divergence.cost(moments).bytes == 2 * 8 * 256 * 2 + (2 * 8 + 4) * 2


def test_a_log_variance_below_the_clamp_counts_as_the_clamp():
    """exp(-15) is invisible beside a mean of any size, so the means are zero."""
    moments = torch.zeros(1, 2, 3, 5)
    moments[:, 1] = -40.0
    drawn = sample_posterior(moments, torch.tensor([5]))
    noise = philox.normals([5], 15).view(1, 1, 3, 5)
    truth = torch.exp(torch.tensor(-15.0, dtype=torch.float64)) * noise.double()
    assert_as_accurate(drawn, torch.exp(torch.tensor(-15.0)) * noise, truth)
    moments[:, 1, 1:] = 0.0  # ten pixels of a standard normal, five at the clamp: 0.5 (exp(-30) - 1 + 30) each
    moments.requires_grad_()
    divergences = kl_divergence(moments)
    truth = (5 * 0.5 * (torch.exp(torch.tensor([-30.0], dtype=torch.float64)) - 1 + 30)).detach()
    assert_as_accurate(divergences.detach(), truth.float(), truth)
    divergences.sum().backward()
    assert moments.grad[:, 1].count_nonzero() == 0
