"""Inputs of attention, and the check of a forward pass against float64."""

import torch
import torch.nn.functional as F
from fastvae_kernels import attention
from support.accuracy import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["plain", "shared"]


def attention_inputs(images, length, channels, dtype=torch.float32, spread=1.0, count=3):
    generator = torch.Generator().manual_seed(length * 1000 + channels)
    shape = (count, images, length, channels)
    return [x.to(DEVICE, dtype) for x in torch.randn(shape, generator=generator) * spread]


def eager_attention(query, key, value, scale):
    """Return torch's attention in the same dtype; its heads need a fourth dimension."""
    return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=scale)[:, 0]


def _eager_product(query, key):
    """Return eager's scores in fp32: on a GPU, where torch can, without widening the factors."""
    if query.is_cuda and query.dtype != torch.float32:
        return torch.bmm(query, key.mT, out_dtype=torch.float32)
    return query.float() @ key.float().mT


def check_forward(ours, query, key, value, scale):
    out, lse = ours
    truth, true_lse = attention.reference(query.double(), key.double(), value.double(), scale)
    assert_as_accurate(out, eager_attention(query, key, value, scale), truth)
    eager_lse = (_eager_product(query, key) * scale).logsumexp(dim=2)
    assert lse.dtype == torch.float32
    if query.is_cuda and query.dtype != torch.float32:
        # A tensor core cuts its sums, where fp32 rounds them, with every 16 products (Fasi et al. 2021, Numerical
        # behavior of NVIDIA tensor cores): here d / 16 times, in eager's split sums fewer times.
        cuts = query.shape[2] / 16 * torch.finfo(torch.float32).eps * true_lse.abs().max()
        lse = true_lse + (lse - true_lse).sign() * ((lse - true_lse).abs() - cuts).clamp(min=0)
        lse = lse.float()
    assert_as_accurate(lse, eager_lse, true_lse)
