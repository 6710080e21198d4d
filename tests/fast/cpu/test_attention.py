"""Attention on a CPU against float64 and torch's own, by oneDNN's products and without; scores in several parts."""

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate

from fastvae.fast.cpu import attention


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "no oneDNN"])
@pytest.mark.parametrize(
    ("tokens", "width", "scores"), [(1, 8, 2**24), (77, 64, 2**24), (300, 512, 300 * 128)], ids=str
)
def test_attention_is_as_accurate_as_torchs(tokens, width, scores, onednn, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "takes_onednn", lambda x: onednn)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (3 * torch.randn(tokens, width, generator=generator) for _ in range(3))
    truth = F.scaled_dot_product_attention(*(values[None, None].double() for values in (q, k, v)))[0, 0]
    eager = F.scaled_dot_product_attention(*(values[None, None] for values in (q, k, v)))[0, 0]
    ours = attention._attention(k, v)(q)
    assert_as_accurate(ours, eager, truth)
    assert torch.equal(ours, eager) == (not onednn or tokens == 1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_by_onednn_is_as_accurate_as_torchs(bias):
    layer = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    x = torch.randn(700, 48, generator=torch.Generator().manual_seed(2))
    truth = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    ours, into = attention._linear(x, layer.weight, layer.bias), torch.empty(700, 32)
    attention._project(x, layer.weight, layer.bias, into)
    assert torch.equal(ours, into)
    assert_as_accurate(ours, layer(x), truth)
