"""Promises of every launcher: the right device, no autocast, any strides."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvae_kernels import attention, divergence, posterior, upsample
from fastvae_kernels.group_norm import group_norm_statistics, scale_shift
from fastvae_kernels.group_norm_silu import group_norm_forward, group_norm_silu
from fastvae_kernels.residual import residual_add
from fastvae_kernels.shared import philox
from support.accuracy import assert_as_accurate
from support.short_run import short_run

KERNELS = Path(posterior.__file__).parent


def test_every_launcher_and_reference_is_guarded():
    """Triton launches on the current device and torch sets none for an op: each must set its own.

    ``op`` and ``kernel`` guard their functions; torch's custom_op does not, and takes longer a call.
    """
    unguarded = []
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            guarded = "on_its_device" in decorators or any(d.startswith("kernel(") for d in decorators)
            if "custom_op" in "".join(decorators) or (node.name.startswith("launch") and not guarded):
                unguarded.append(f"{path.name}: {node.name}")
    assert not unguarded, unguarded


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("strides", ["step", "expanded"])
def test_seeds_in_any_strides(strides):
    seeds = torch.tensor([1, 9, 2, 9])[::2] if strides == "step" else torch.tensor([7]).expand(2)
    moments = torch.randn(2, 8, 4, 4)
    assert torch.equal(posterior.launch(moments, seeds), posterior.launch(moments, seeds.contiguous()))
    offsets = torch.tensor([4, 0, 8, 0])[::2]
    drawn, expected = (
        posterior.launch(moments, s, o, 256) for s, o in ((seeds, offsets), (seeds.contiguous(), offsets.contiguous()))
    )
    assert torch.equal(drawn, expected)


def test_a_backward_pass_through_an_op_without_gradient_is_refused():
    """Not its forward pass: statistics of an x with a gradient are taken apart."""
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    y = scale_shift(x, torch.ones(1, 8), torch.ones(1, 8))
    with pytest.raises(RuntimeError, match=r"fastvae\.scale_shift\.default has no gradient"):
        y.sum().backward()
    query = torch.randn(1, 4, 8, requires_grad=True)
    grads = attention.spatial_attention_backward(query, query, query, None, query, torch.randn(1, 4), 0.5)
    assert isinstance(grads, list)
    with pytest.raises(RuntimeError, match=r"spatial_attention_backward\.default has no gradient"):
        grads[0].sum().backward()


def test_a_gradient_knows_the_arguments_that_a_call_left_out():
    h, residual = (torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(2))
    (dh, dresidual) = torch.autograd.grad(residual_add(h, residual)[0].sum(), (h, residual))
    assert torch.equal(dh, torch.ones_like(h))
    assert torch.equal(dresidual, torch.ones_like(h))


def test_an_empty_batch_with_a_stream():
    threads = philox.stream_threads(1, 132, 2048)
    empty = torch.empty(0, 8, 4, 4)
    assert posterior.sample_posterior(empty, torch.tensor([3]), torch.tensor([0]), threads).shape == (0, 4, 4, 4)


@pytest.mark.usefixtures("on_device")
def test_a_log_sum_exp_in_any_strides():
    query = torch.randn(2, 5, 32)
    out, lse = attention.launch(query, query, query, 0.1)
    transposed = lse.t().contiguous().t()
    for one, other in zip(
        attention.launch_backward(out, query, query, query, out, lse, 0.1),
        attention.launch_backward(out, query, query, query, out, transposed, 0.1),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_autocast_does_not_reach_into_an_op():
    x, weight, bias = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3), torch.randn(8)
    expected = upsample.upsample_conv(x, weight, bias)
    for tensor in (x, weight):
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = upsample.upsample_conv(x, weight, bias)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_upsample_takes_a_bias_of_another_dtype():
    x, weight, bias = torch.randn(1, 8, 4, 4).bfloat16(), torch.randn(8, 8, 3, 3).bfloat16(), torch.randn(8)
    truth = upsample.reference(x.double(), weight.double(), bias.bfloat16().double())
    eager = upsample.reference(x, weight, bias)
    assert_as_accurate(upsample.upsample_conv(x, weight, bias), eager, truth)


def test_statistics_taken_apart_can_be_differentiated_through():
    x, weight, bias = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(8), torch.randn(8)
    group_norm_silu(x, weight, bias, 4, 1e-6).square().sum().backward()
    expected, x.grad = x.grad, None
    group_norm_silu(x, weight, bias, 4, 1e-6, partials=group_norm_statistics(x)).square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert not any(moment.requires_grad for moment in group_norm_forward(x, weight, bias, 4, 1e-6, True)[1:])


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 40, 30), (2, 16, 40, 30), (2, 8, 60, 50), (2, 8, 5, 5)],
    ids=["batch", "channels", "more chunks", "fewer chunks"],
)
def test_statistics_of_another_batch_or_number_of_chunks_are_refused(shape):
    """Partials of another image with as many chunks cannot be recognised without reading the values."""
    x, weight, bias = torch.randn(2, 8, 40, 30), torch.randn(8), torch.randn(8)
    with pytest.raises(ValueError, match=r"partials must be torch\.float32"):
        group_norm_silu(x, weight, bias, 4, 1e-6, partials=group_norm_statistics(torch.randn(shape)))


@pytest.mark.parametrize("op", short_run(["divergence", "sample"], ["sample"]))
def test_one_compilation_serves_every_batch(op):
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def call(moments, seeds):
        return divergence.kl_divergence(moments) if op == "divergence" else posterior.sample_posterior(moments, seeds)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=count, dynamic=True, fullgraph=True)
    for batch in (2, 3, 4, 5):
        moments, seeds = torch.randn(batch, 8, 4, 4), torch.arange(batch)
        assert torch.equal(compiled(moments, seeds), call(moments, seeds))
    assert len(compilations) == 1


def test_without_triton_the_references_serve():
    """As on macOS and Windows: in a process where the import of triton fails."""
    probe = f"""
import sys
sys.modules["triton"] = None
sys.path.insert(0, {str(KERNELS.parent)!r})
import torch
from fastvae_kernels import attention, group_norm_silu, posterior, upsample
from fastvae_kernels.shared import runtime
assert runtime.KERNEL_DEVICES == ()
x = torch.randn(1, 8, 4, 4)
group_norm_silu.group_norm_silu(x, torch.ones(8), torch.zeros(8), 4, 1e-6)
posterior.sample_posterior(x, torch.tensor([1]))
attention.spatial_attention(torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8), 0.1)
upsample.upsample_conv(x, torch.randn(8, 8, 3, 3))
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
