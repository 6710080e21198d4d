"""sample_posterior: draws by seed and by CUDA generator in the fused op, by other generators as in diffusers."""

from types import SimpleNamespace

import pytest
import torch
from fastvae_kernels import posterior
from fastvae_kernels.shared import philox
from support.accuracy import assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvae.latents import sampling
from fastvae.latents.sampling import sample_posterior

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's CUDA generator needs a GPU")


def eager(moments, noise):
    """Return the sample of diffusers' DiagonalGaussianDistribution with this noise."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0)) * noise


def noise_of(*seeds, shape):
    """Return the noise that the op draws by seed: the sample with a mean and log-variance of zero."""
    return posterior.sample_posterior(torch.zeros(len(seeds), 2 * shape[0], *shape[1:]), philox.seed_tensor(seeds))


LAYOUTS = {
    "NCHW": lambda n, c, h, w: torch.randn(n, c, h, w),
    "NHWC": lambda n, c, h, w: torch.randn(n, h, w, c).permute(0, 3, 1, 2),
    "a slice of NCHW": lambda n, c, h, w: torch.randn(n, c + 1, h + 2, w + 2)[:, 1:, 1:-1, 1:-1],
    "a slice of NHWC": lambda n, c, h, w: torch.randn(n, h + 2, w + 2, c + 1).permute(0, 3, 1, 2)[:, 1:, 1:-1, 1:-1],
    "width before height": lambda n, c, h, w: torch.randn(n, c, w, h).transpose(2, 3),
    "channels before rows": lambda n, c, h, w: torch.randn(c, n, h, w).transpose(0, 1),
    "one row for all": lambda n, c, h, w: torch.randn(1, c, h, w).expand(n, c, h, w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_those_of_eager(layout):
    for shape in ((2, 8, 5, 3), (1, 8, 5, 3), (3, 2, 4, 1), (2, 8, 1, 1), (2, 2, 1, 5), (0, 4, 2, 2)):
        moments = LAYOUTS[layout](*shape)
        noise = noise_of(*range(shape[0]), shape=(shape[1] // 2, *shape[2:]))
        ours, theirs = sample_posterior(moments, seeds=range(shape[0])), eager(moments, noise)
        assert ours.stride() == theirs.stride(), shape
        generator = torch.Generator().manual_seed(1)
        drawn = eager(moments, torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(sample_posterior(moments, generator=generator), drawn)
        truth = eager(moments.double(), noise.double())
        assert_as_accurate(ours, theirs, truth)


@pytest.mark.parametrize("layout", ["NCHW", "a slice of NHWC"])
def test_gradients_by_seed(layout):
    """Gradients of the op, and through the copy that other strides need."""
    moments = LAYOUTS[layout](2, 8, 5, 3)
    noise, grad = noise_of(3, 4, shape=(4, 5, 3)), torch.randn(2, 4, 5, 3)
    results = []
    for wide, function in (
        (torch.float32, lambda x: sample_posterior(x, seeds=[3, 4])),
        (torch.float32, lambda x: eager(x, noise)),
        (torch.float64, lambda x: eager(x, noise.double())),
    ):
        leaf = moments.to(wide).detach().requires_grad_()
        results.append(torch.autograd.grad(function(leaf), leaf, grad.to(wide))[0])
    assert_as_accurate(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_reference_has_the_bits_of_diffusers_in_any_batch(form, dtype):
    """The reference runs on a CPU; 8 and 16 divide none of the sizes, so that vector loops have tails."""
    seeds = list(range(7))
    for shape in ((8, 9, 11), (2, 3, 5), (2, 1, 1), (8, 37, 29)):
        moments = torch.randn(7, *shape).to(dtype).contiguous(memory_format=form)
        whole = posterior.reference(moments, torch.tensor(seeds))
        noise = philox.normals(seeds, moments[0].numel() // 2).view(whole.shape).to(dtype)
        assert torch.equal(whole, eager(moments, noise))
        for row in seeds:
            assert torch.equal(posterior.reference(moments[row : row + 1], torch.tensor([row]))[0], whole[row])


def test_seeds_in_a_tensor_are_not_read_by_the_host(monkeypatch):
    moments, seeds = torch.randn(2, 8, 3, 5), [7, 2**64 - 3]
    expected = sample_posterior(moments, seeds=seeds)
    given = philox.seed_tensor(seeds)
    monkeypatch.setattr(philox, "seed_list", lambda seeds: pytest.fail("this would wait for the GPU"))
    for tensor in (given, given.view(torch.uint64)):
        assert torch.equal(sample_posterior(moments, seeds=tensor), expected)


def test_seeds_compile_in_one_graph():
    compiled = torch.compile(
        lambda moments, seeds: sample_posterior(moments, seeds=seeds), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in ((2, 8, 3, 5), (3, 8, 4, 7)):
        moments, seeds = torch.randn(shape), torch.arange(shape[0])
        assert torch.equal(compiled(moments, seeds), sample_posterior(moments, seeds=seeds))


class CudaGenerator(torch.Generator):
    """The methods of a CUDA generator that the sampler calls, for a machine without a GPU."""

    def __new__(cls, seed, offset=0, device="cuda:0"):
        return super().__new__(cls)

    def __init__(self, seed, offset=0, device="cuda:0"):
        self.seed_, self.offset, self.device_ = seed, offset, torch.device(device)

    device = property(lambda self: self.device_)

    def initial_seed(self):
        return self.seed_

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


@pytest.fixture
def cuda_device(monkeypatch):
    """Patch torch.cuda as on a GPU of one multiprocessor with 512 threads, and return its default generator."""
    default, card = CudaGenerator(99, 40), SimpleNamespace(multi_processor_count=1, max_threads_per_multi_processor=512)
    for name, value in {
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_properties": lambda device: card,
        "default_generators": (default,),
        "device_of": lambda tensor: torch.autocast("cpu", enabled=False),  # any context: the tensors are a CPU's
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return default


@pytest.fixture
def drawn_by_the_op(cuda_device, monkeypatch):
    """Draw for CPU moments as for those of a GPU; _cuda_generators is tested separately below."""
    monkeypatch.setattr(
        sampling, "_cuda_generators", lambda mean, given: [cuda_device if one is None else one for one in given]
    )
    return cuda_device


def stream_rows(shape, drawn, threads=512):
    """Return the noise of rows [N, ...] from (seed, offset): one stream for all, or one for each."""
    each = torch.Size(shape).numel() // len(drawn)
    return torch.cat([philox.stream_normals(*one, each, threads) for one in drawn]).view(shape)


SHAPE = (3, 4, 11, 13)  # 1716 elements: one launch of 512 threads takes four lanes of them


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("given", "drawn", "advance"),
    [
        (lambda default: None, [(99, 40)], {0: 4}),
        (lambda default: CudaGenerator(2**64 - 5, 8), [(2**64 - 5, 8)], {}),
        (lambda default: [CudaGenerator(5)], [(5, 0)], {}),
        (lambda default: [CudaGenerator(s, 4 * s) for s in (1, 2, 3)], [(1, 4), (2, 8), (3, 12)], {}),
        (lambda default: [None, CudaGenerator(2), None], [(99, 40), (2, 0), (99, 44)], {0: 8}),
    ],
    ids=["the default", "one", "a list of one", "one a row", "the default twice"],
)
def test_a_cuda_generator_draws_torchs_stream_and_advances(given, drawn, advance, form, drawn_by_the_op):
    moments = torch.zeros(3, 8, 11, 13).contiguous(memory_format=form)
    generator = given(drawn_by_the_op)
    drawn_latents = sample_posterior(moments, generator=generator)
    assert (drawn_latents - stream_rows(SHAPE, drawn)).abs().max() < 2e-6
    assert drawn_latents.stride() == eager(moments, torch.zeros(SHAPE)).stride()
    assert drawn_by_the_op.offset == 40 + advance.get(0, 0)
    own = [one for one in (generator if isinstance(generator, list) else [generator]) if one is not None]
    begun = [offset for seed, offset in drawn if seed != 99]
    assert [one.offset for one in own] == [offset + 4 for offset in begun]


def test_a_second_draw_continues_the_stream(drawn_by_the_op):
    generator, moments = CudaGenerator(5), torch.zeros(1, 8, 23, 29)  # 2668 elements: two iterations of 512 threads
    for offset in (0, 8):
        noise = stream_rows((1, 4, 23, 29), [(5, offset)])
        assert (sample_posterior(moments, generator=generator) - noise).abs().max() < 2e-6
    assert generator.offset == 16


def fake_mean(dtype=torch.float32, device="cuda:0", shape=(2, 4, 3, 3)):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


def test_the_op_draws_only_from_cuda_generators(cuda_device):
    one, elsewhere = CudaGenerator(1), CudaGenerator(1, device="cuda:1")
    for dtype in DTYPES:
        assert sampling._cuda_generators(fake_mean(dtype), [None]) == [cuda_device]
    assert sampling._cuda_generators(fake_mean(), [one, None]) == [one, cuda_device]
    for case, mean, given in (
        ("a CPU's moments", fake_mean(device="cpu"), [None]),
        ("a CPU's generator", fake_mean(), [torch.Generator()]),
        ("a CPU's among them", fake_mean(), [one, torch.Generator()]),
        ("another GPU's", fake_mean(), [elsewhere]),
        ("float64: two words for each normal", fake_mean(torch.float64), [one]),
        ("no element", fake_mean(shape=(0, 4, 3, 3)), []),
        ("2 GiB: several launches", fake_mean(shape=(2**13, 4, 128, 128)), [one]),
    ):
        assert sampling._cuda_generators(mean, given) == [], case


@pytest.mark.parametrize("state", ["not initialised", "capturing", "compiling", "ROCm", "autocast", "no Triton"])
def test_torch_draws_where_the_op_cannot(state, cuda_device, monkeypatch):
    name, value = {
        "not initialised": ("torch.cuda.is_initialized", lambda: False),
        "capturing": ("torch.cuda.is_current_stream_capturing", lambda: True),
        "compiling": ("torch.compiler.is_compiling", lambda: True),
        "ROCm": ("torch.version.hip", "6.2"),
        "autocast": ("torch.is_autocast_enabled", lambda kind: kind == "cuda"),
        "no Triton": ("fastvae.latents.sampling.KERNEL_DEVICES", ()),
    }[state]
    assert sampling._cuda_generators(fake_mean(), [None]) == [cuda_device]
    monkeypatch.setattr(name, value)
    assert sampling._cuda_generators(fake_mean(), [None]) == []


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("count", ["default", "one", "each"])
def test_on_a_gpu_latents_and_generators_equal_eager(count, form, dtype):
    moments = torch.randn(3, 8, 96, 104, device="cuda").to(dtype).contiguous(memory_format=form)
    ours, theirs = ([torch.Generator("cuda").manual_seed(2**63 + i) for i in range(3)] for _ in range(2))
    for _ in range(2):
        torch.cuda.manual_seed(1)
        given = {"default": None, "one": ours[0], "each": ours}[count]
        drawn_latents = sample_posterior(moments, generator=given)
        left = torch.cuda.get_rng_state()
        torch.cuda.manual_seed(1)
        if count == "each":
            rows = [torch.randn(1, 4, 96, 104, generator=g, device="cuda", dtype=dtype) for g in theirs]
            noise = torch.cat(rows)
        else:
            given = None if count == "default" else theirs[0]
            noise = torch.randn(3, 4, 96, 104, generator=given, device="cuda", dtype=dtype)
        assert torch.equal(drawn_latents, eager(moments, noise))
        assert torch.equal(torch.cuda.get_rng_state(), left)
        assert [g.get_offset() for g in ours] == [g.get_offset() for g in theirs]


@on_a_gpu
def test_on_a_gpu_a_captured_graph_draws_new_noise_at_every_replay():
    moments = torch.zeros(1, 8, 8, 8, device="cuda")
    sample_posterior(moments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample_posterior(moments)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(drawn.clone())
    assert not torch.equal(*replays)


def test_a_draw_by_seed_can_be_differentiated_twice():
    """Torch's operations compute the sample, with the noise of the op and the result of the op."""
    moments = torch.randn(2, 8, 3, 5, requires_grad=True)
    drawn = sampling.sample_posterior(moments, seeds=[1, 2])
    assert torch.allclose(drawn.detach(), sampling.sample_posterior(moments.detach(), seeds=[1, 2]))
    (slope,) = torch.autograd.grad(drawn.square().sum(), moments, create_graph=True)
    (again,) = torch.autograd.grad(slope.sum(), moments)
    # d/dmean of the slopes 2 z + z (z - mean), where z - mean depends only on the log-variance: 2 + (z - mean).
    mean = moments.detach().chunk(2, dim=1)[0]
    assert torch.allclose(again[:, :4], 2 + drawn.detach() - mean)
