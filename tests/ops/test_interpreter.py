"""The corrections of tests/conftest.py to Triton's interpreter, without which bfloat16 differs from a GPU's."""

import pytest
import torch
from fastvae_kernels.shared.runtime import tl, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _product_kernel(left_ptr, right_ptr, product_ptr, SIDE: tl.constexpr):
    index = tl.arange(0, SIDE)
    place = index[:, None] * SIDE + index
    product = tl.dot(tl.load(left_ptr + place), tl.load(right_ptr + place), input_precision="ieee")
    tl.store(product_ptr + place, product.to(product_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_product_of_half_precision_is_summed_in_fp32(dtype):
    left, right = (torch.randn(32, 32).to(DEVICE, dtype) for _ in range(2))
    product = torch.empty(32, 32, device=DEVICE)
    _product_kernel[(1,)](left, right, product, SIDE=32)
    assert (product - left.double() @ right.double()).abs().max() < 32 * 2**-22


@triton.jit
def _cast_kernel(values_ptr, cast_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(cast_ptr + index, tl.load(values_ptr + index).to(cast_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_rounds_to_nearest_ties_to_even(dtype):
    """Halfway values above an even and above an odd neighbour, the largest, infinities, zeros and random ones."""
    special = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1e30, -1e30, float("inf"), -float("inf")]
    values = torch.cat([torch.tensor([*special, 0.0, -0.0, 3.4e38]), torch.randn(1024 - 11)]).to(DEVICE)
    cast = torch.empty(1024, dtype=dtype, device=DEVICE)
    _cast_kernel[(1,)](values, cast, COUNT=1024)
    assert torch.equal(cast, values.to(dtype))
    nothing = torch.full((1024,), float("nan"), device=DEVICE)
    _cast_kernel[(1,)](nothing, cast, COUNT=1024)
    assert cast.isnan().all()
