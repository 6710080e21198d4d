"""Rounds and chunks of attention: results against float64, workspace, and bits that do not depend on the split."""

import pytest
import torch
from fastvae_kernels import attention
from fastvae_kernels.attention import spatial_attention, spatial_attention_backward
from fastvae_kernels.parts import attention_gradient, attention_products, attention_tiles
from fastvae_kernels.shared import tiles
from support.attention_checks import DTYPES, attention_inputs, check_forward

PRODUCTS = {
    "one round, one tile": ((1, 50, 32), 4096, 1.0),
    "chunks of 40, the last ragged": ((2, 101, 48), 40, 1.0),
    "several tiles of keys, large logits": ((1, 290, 96), 256, 6.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PRODUCTS)
def test_rounds_and_chunks_against_float64(case, dtype, monkeypatch):
    shape, chunk, spread = PRODUCTS[case]
    monkeypatch.setattr(attention_tiles, "CHUNK", chunk)
    query, key, value = attention_inputs(*shape, dtype, spread)
    scale = shape[2] ** -0.5
    check_forward(spatial_attention(query, key, value, scale), query, key, value, scale)


# (images, S, most queries at a time, rows of the workspace) and the rounds they make
ROUNDS = {
    "eight images of 512²: all at once": ((8, 4096, 4096, 32768), [(0, 8, 0, 4096)]),
    "a ninth is a round of its own": ((9, 4096, 4096, 32768), [(0, 8, 0, 4096), (8, 1, 0, 4096)]),
    "one image takes more than there is: its chunks, one by one": (
        (2, 70, 32, 31),
        [(0, 1, 0, 32), (0, 1, 32, 32), (0, 1, 64, 6), (1, 1, 0, 32), (1, 1, 32, 32), (1, 1, 64, 6)],
    ),
    "ragged both ways": ((3, 40, 32, 64), [(0, 2, 0, 32), (0, 2, 32, 8), (2, 1, 0, 32), (2, 1, 32, 8)]),
    "no image": ((0, 40, 32, 64), []),
    "no position": ((3, 0, 32, 64), []),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_rounds(case, monkeypatch):
    (images, length, chunk, rows), rounds = ROUNDS[case]
    monkeypatch.setattr(attention_tiles, "CHUNK", chunk)
    monkeypatch.setattr(attention_tiles, "WORKSPACE", rows * 2 * length)
    assert attention_tiles.rounds_of(images, length, 2 * length) == rounds


def test_the_sums_of_the_gradients_are_in_the_workspace():
    """Few tokens, many images: the fp32 sums of dk and dv need eight times the bytes of the weights and slopes."""
    for images, length, channels in ((20_000, 64, 512), (8, 4096, 512), (3, 16384, 512)):
        query = torch.empty(images, length, channels, dtype=torch.bfloat16, device="meta")
        square, _, across, rounds = attention_gradient._plan(query)
        first = rounds[0]
        image = 2 * across * square.columns * 2 * first.count + 2 * 4 * length * channels
        assert first.images == 1 or first.images * image <= attention_tiles.WORKSPACE < (first.images + 1) * image


def test_a_batch_of_eight_is_three_launches_and_memory_is_linear():
    """512² and 2048² on fake tensors, with the shipped chunk and workspace."""
    assert attention.cost(torch.empty(8, 4096, 512, dtype=torch.bfloat16, device="meta")).launches == 3
    for length in (16384, 65536):
        (*_, rounds) = attention_products._plan(torch.empty(3, length, 512, device="meta"), tiles.TARGETS["sm_90"])
        assert max(r.images * r.count for r in rounds) == 4096
        assert len(rounds) == 3 * length // 4096


@pytest.mark.parametrize(
    ("images", "rounds"),
    [
        pytest.param(3, (2,), id="3, two and one"),
        *(pytest.param(images, range(1, images), id=str(images), marks=pytest.mark.slow) for images in (3, 5)),
    ],
)
def test_the_split_into_rounds_and_chunks_changes_no_bit(images, rounds, monkeypatch):
    """In rounds of 1 to all but one image, the last one smaller; chunks hold whole tiles, as 4096 does."""
    query, key, value, grad = attention_inputs(images, 150, 48, torch.float16, count=4)
    whole = spatial_attention(query, key, value, 0.2)
    grads = spatial_attention_backward(grad, query, key, value, *whole, 0.2)
    shared = spatial_attention_backward(grad, query, key, None, *whole, 0.2)
    for count in rounds:
        rows = 150 * count if count > 1 else 1
        monkeypatch.setattr(attention_tiles, "WORKSPACE", rows * 256 * 2)
        for left, right in zip(spatial_attention(query, key, value, 0.2), whole, strict=True):
            assert torch.equal(left, right)
        for left, right in zip(
            spatial_attention_backward(grad, query, key, value, *whole, 0.2)
            + spatial_attention_backward(grad, query, key, None, *whole, 0.2),
            grads + shared,
            strict=True,
        ):
            assert torch.equal(left, right)
        with monkeypatch.context() as patch:
            patch.setattr(attention_tiles, "CHUNK", 128)
            for left, right in zip(spatial_attention(query, key, value, 0.2), whole, strict=True):
                assert torch.equal(left, right)
