"""Gradients of attention: against float64 as closely as torch's own, and the formulas of the reference."""

import pytest
import torch
from fastvae_kernels import attention
from fastvae_kernels.attention import spatial_attention, spatial_attention_backward, spatial_attention_shared
from fastvae_kernels.parts import attention_gradient, attention_tiles
from support.accuracy import assert_as_accurate
from support.attention_checks import DTYPES, FORMS, attention_inputs, eager_attention
from support.thinned import thinned

GRADIENTS = {
    "S=2: the fewest keys that leave a gradient": ((20, 2, 16), 4096, 1.0),
    "S=45, d=48: ragged both ways": ((2, 45, 48), 4096, 1.0),
    "chunks of 32 queries: sums go on": ((1, 75, 80), 32, 1.0),
    "logits of hundreds": ((6, 40, 32), 4096, 6.0),
}


@pytest.mark.parametrize(("case", "dtype", "form"), thinned(GRADIENTS, DTYPES, FORMS, keep=2))
def test_gradients_against_float64(case, dtype, form, monkeypatch):
    shape, chunk, spread = GRADIENTS[case]
    monkeypatch.setattr(attention_tiles, "CHUNK", chunk)
    _check_gradients(shape, spread, dtype, form == "shared")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lone_key_has_weight_one_and_no_slope(dtype):
    """For any score: out is v and dv is do; dq and dk are rounding errors of zero."""
    query, key, value, grad = attention_inputs(3, 1, 16, dtype, 5.0, count=4)
    out, lse = spatial_attention(query, key, value, 1.0)
    # The weight is stored in the dtype; the log-sum-exp, from which the gradient computes it again, is fp32.
    stored, summed = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    assert ((out - value).abs() <= stored * value.abs()).all()
    grad_query, grad_key, grad_value = spatial_attention_backward(grad, query, key, value, out, lse, 1.0)
    assert ((grad_value - grad).abs() <= (stored + 4 * summed * lse.abs().max()) * grad.abs()).all()
    # do v and delta are sums of the same 16 products in two orders.
    noise = (16 * summed + stored) * (grad * value).abs().sum(dim=2).max() * key.abs().max()
    assert grad_query.abs().max() <= noise
    assert grad_key.abs().max() <= noise


def test_gradients_at_d_512():
    _check_gradients((1, 35, 512), 1.0, torch.bfloat16, True)
    _check_gradients((1, 35, 512), 1.0, torch.float32, False)


def _check_gradients(shape, spread, dtype, shared):
    *inputs, grad = attention_inputs(*shape, dtype, spread, count=4)
    inputs, grad = inputs[: 2 if shared else 3], grad / spread
    scale = shape[2] ** -0.5
    truths, eagers = (
        torch.autograd.grad(eager_attention(leaves[0], leaves[1], leaves[-1], scale), leaves, grad.to(wide))
        for wide in (torch.float64, dtype)
        for leaves in [[x.to(wide).requires_grad_() for x in inputs]]
    )
    query, key = inputs[:2]
    value = None if shared else inputs[2]
    out, lse = spatial_attention(query, key, key if shared else value, scale)
    ours = attention_gradient.gradients(grad, query, key, value, out, lse, scale)
    for our, eager, truth in zip(ours, eagers, truths, strict=True):
        assert_as_accurate(our, eager, truth)


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_autograd_reaches_every_input(shared):
    """The log-sum-exp has no gradient."""
    inputs = [x.requires_grad_() for x in attention_inputs(2, 13, 24, count=2 if shared else 3)]
    op, reference_inputs = (
        (spatial_attention_shared, [inputs[0], inputs[1], inputs[1]])
        if shared
        else (
            spatial_attention,
            inputs,
        )
    )
    out, lse = op(*inputs, 0.2)
    assert out.requires_grad
    assert not lse.requires_grad
    ours = torch.autograd.grad(out.square().sum(), inputs)
    theirs = torch.autograd.grad(eager_attention(*reference_inputs, 0.2).square().sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-4, atol=1e-5)


def test_reference_gradients_are_autograds():
    """The CPU's backward, in float64: the formulas that the kernels follow."""
    *inputs, grad = (x.cpu().double() for x in attention_inputs(2, 11, 16, count=4))
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention.reference(*leaves, 0.3)
    theirs = torch.autograd.grad(out, leaves, grad)
    ours = attention.reference_backward(grad, *(x.detach() for x in leaves), out.detach(), lse.detach(), 0.3)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-12, atol=1e-12)
