"""Attention of one head: against float64 as closely as torch's own."""

import pytest
import torch
from fastvae_kernels import attention
from fastvae_kernels.attention import spatial_attention, spatial_attention_backward, spatial_attention_shared
from fastvae_kernels.parts import attention_products, attention_tiles
from fastvae_kernels.shared import runtime
from support.attention_checks import DEVICE, DTYPES, FORMS, attention_inputs, check_forward
from support.thinned import thinned


def _exact(x):
    """Return integers on a GPU: their sums are exact, so eager's order of sums does not decide cases of one row."""
    return x.round() if x.is_cuda else x


# The fault that the case shows: (images, S, d), spread of q and k
CASES = {
    "S=1: one key in a tile, padded query": ((40, 1, 32), 1.0),
    "d=8: narrower than tl.dot takes": ((1, 19, 8), 1.0),
    "S=33: a tile and one key": ((1, 33, 48), 1.0),
    "S=101, d=80: nothing divides anything": ((2, 101, 80), 1.0),
    "S=64: no tail at all": ((1, 64, 64), 1.0),
    "logits of hundreds: a missed rescale or maximum": ((1, 75, 96), 8.0),
    "S=1, d=264: one key, many channels": ((12, 1, 264), 1.0),
    "d=320: channels end inside a tile and a step": ((2, 70, 320), 1.0),
    "d=512, logits of hundreds": ((1, 75, 512), 4.0),
}


@pytest.mark.parametrize(("case", "dtype", "form"), thinned(CASES, DTYPES, FORMS))
def test_forward_against_float64(case, dtype, form):
    shape, spread = CASES[case]
    query, key, value = attention_inputs(*shape, dtype, spread)
    scale = shape[2] ** -0.5
    if form == "shared":
        check_forward(spatial_attention_shared(query, key, scale), query, key, key, scale)
    else:
        check_forward(spatial_attention(query, key, value, scale), query, key, value, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_d_512(dtype):
    """The channels of every published model; 37 positions are one tile and a ragged one."""
    query, key, value = attention_inputs(1, 37, 512, dtype)
    check_forward(spatial_attention(query, key, value, 0.044), query, key, value, 0.044)
    check_forward(spatial_attention_shared(query, key, 0.044), query, key, key, 0.044)


def test_keys_that_grow_along_the_sequence():
    """Every tile has a much larger maximum: the earlier sums must shrink to nothing."""
    query, key, value = attention_inputs(1, 90, 32)
    key = _exact(key.abs() * torch.linspace(0, 30, 90, device=DEVICE)[None, :, None])
    query = _exact(query.abs())
    for flip in (False, True):
        one = key.flip(1) if flip else key
        check_forward(spatial_attention(query, one, value, 1.0), query, one, value, 1.0)


def test_the_tail_of_the_keys_has_no_weight():
    """All scores are far below zero: one key past the end, at zero, would have all the weight."""
    query, _, value = attention_inputs(1, 21, 16)
    query = _exact(query.abs()) + 1
    check_forward(spatial_attention(query, -query * 50, value, 1.0), query, -query * 50, value, 1.0)


def test_whole_logits_of_hundreds_cost_the_weights_no_digit():
    """Scores are exact here, and eager subtracts before it rounds."""
    query, key, value = attention_inputs(1, 90, 16)
    query, key = (query * 4).round(), (key * 16).round()
    check_forward(spatial_attention(query, key, value, 1.0), query, key, value, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 512])
def test_logits_of_billions(channels, dtype):
    """Beyond 2^24 a product and its rounding differ by powers of two: no weight may overflow, not all may vanish."""
    generator = torch.Generator().manual_seed(channels)
    query, key, value = (0.75 + torch.rand(3, 1, 40, channels, generator=generator) / 4).to(DEVICE)
    size = {torch.float16: 2.0**13}.get(dtype, 2.0**17)
    query, key, value = ((x * factor).to(dtype) for x, factor in ((query, size), (key, size), (value, 1.0)))
    out, lse = spatial_attention(query, key, value, channels**-0.5)
    _, true_lse = attention.reference(query.double(), key.double(), value.double(), channels**-0.5)
    assert ((lse - true_lse).abs() <= 1e-6 * true_lse.abs()).all()
    # The largest key may depend on a sum's rounding; the result is a mean of values in any case.
    least, most, eps = value.amin(1, keepdim=True), value.amax(1, keepdim=True), torch.finfo(dtype).eps
    assert ((out >= least * (1 - eps)) & (out <= most * (1 + eps))).all()


def test_a_tile_that_is_all_minus_infinity_weighs_nothing():
    query, key, value = attention_inputs(1, 300, 16)
    query[..., 0], key[:, :40, 0], key[:, 40:, 0] = 1e20, 0.0, -1e20
    out, _ = spatial_attention(query, key, value, 1.0)
    alone, _ = spatial_attention(query[:, :40], key[:, :40], value[:, :40], 1.0)
    assert torch.equal(out[:, :40], alone)


def test_a_negative_scale_is_that_of_the_negative_query():
    query, key, value = attention_inputs(1, 40, 16)
    check_forward(spatial_attention(query, key, value, -0.25), query, key, value, -0.25)


def test_a_row_does_not_depend_on_the_batch():
    query, key, value, grad = attention_inputs(3, 41, 40, count=4)
    out, lse = spatial_attention(query, key, value, 0.2)
    grads = spatial_attention_backward(grad, query, key, value, out, lse, 0.2)
    for image in range(3):
        one = slice(image, image + 1)
        alone, alone_lse = spatial_attention(query[one], key[one], value[one], 0.2)
        assert torch.equal(alone, out[one])
        assert torch.equal(alone_lse, lse[one])
        for left, right in zip(
            spatial_attention_backward(grad[one], query[one], key[one], value[one], alone, alone_lse, 0.2),
            grads,
            strict=True,
        ):
            assert torch.equal(left, right[one])


def test_shared_keys_give_the_bits_of_two_copies():
    query, x, _ = attention_inputs(1, 37, 32)
    for left, right in zip(spatial_attention_shared(query, x, 0.3), spatial_attention(query, x, x, 0.3), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_an_empty_input_gives_an_empty_output(shape):
    inputs = [torch.empty(shape, device=DEVICE, requires_grad=True) for _ in range(3)]
    out, lse = spatial_attention(*inputs, 1.0)
    assert out.shape == shape
    assert lse.shape == shape[:2]
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.shape == shape for grad in grads)


def test_any_strides_and_offsets_are_taken():
    fused = attention_inputs(2, 23, 49, count=1)[0][:, :, 1:]
    query, key, value = fused.chunk(3, dim=2)
    out, lse = spatial_attention(query, key, value, 0.3)
    plain = spatial_attention(query.contiguous(), key.contiguous(), value.contiguous(), 0.3)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])
    grads = spatial_attention_backward(out.mT.contiguous().mT, query, key, value, out, lse, 0.3)
    for left, right in zip(grads, spatial_attention_backward(out, query, key, value, out, lse, 0.3), strict=True):
        assert torch.equal(left, right)


def test_nothing_is_written_past_the_end(monkeypatch):
    """Only the image in the middle is written; its neighbours keep the NaN that tests fill empty tensors with."""
    query, key, value = attention_inputs(3, 21, 24)
    with monkeypatch.context() as patched:
        patched.setattr(attention_products, "rounds_of", lambda *_: [attention_tiles.Round(1, 1, 0, 21)])
        middle = attention_products.attend(query, key, value, 0.4)
    for one in middle:
        assert one[[0, 2]].isnan().all()
    for one, all_three in zip(middle, attention_products.attend(query, key, value, 0.4), strict=True):
        assert torch.equal(one[1], all_three[1])


def test_other_arguments_are_refused():
    x = torch.zeros(1, 4, 16, device=DEVICE)
    huge = torch.empty(1, 2**26, 32, device="meta")
    for message, call in {
        r"query must be \[N, S, d\], got shape \(4, 16\)": (x[0], x, x),
        "query must have a multiple of 8 up to 512 channels, got 12": (x[..., :12], x, x),
        "got 520": (torch.zeros(1, 2, 520, device=DEVICE),) * 3,
        "query must be float32, float16, bfloat16 or float64, got torch.int64": (x.long(),) * 3,
        r"key must be like query, torch.float32 of shape \(1, 4, 16\), got torch.float16": (x, x.half(), x),
        r"value must be like query, .* of shape \(1, 3, 16\)": (x, x, x[:, :3]),
        r"fewer than 2\^31 elements a row, got 67108864 x 32": (huge,) * 3,
    }.items():
        with pytest.raises(ValueError, match=message):
            spatial_attention(*call, 1.0)
    with pytest.raises(ValueError, match=r"x must be like query"):
        spatial_attention_shared(x, x.half(), 1.0)


def test_op_and_launcher_give_the_same_bits():
    query, key, value = attention_inputs(1, 19, 16, torch.float16)
    out, lse = spatial_attention(query, key, value, 0.5)
    assert torch.equal(attention.launch(query, key, value, 0.5)[0], out)
    assert torch.equal(attention.launch_shared(query, key, 0.5)[0], spatial_attention_shared(query, key, 0.5)[0])
    arguments = (out, query, key, value, out, lse, 0.5)
    for left, right in zip(attention.launch_backward(*arguments), spatial_attention_backward(*arguments), strict=True):
        assert torch.equal(left, right)


def test_opcheck():
    query, key, value = (x.requires_grad_() for x in attention_inputs(1, 9, 16))
    torch.library.opcheck(spatial_attention, (query, key, value, 0.5))
    torch.library.opcheck(spatial_attention_shared, (query.half().detach(), key.half().detach(), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
def test_opcheck_of_permuted_inputs(dtype):
    """Tokens of an NCHW image: outputs and gradients are contiguous, as the fakes say."""
    query, key, value, grad = (x.mT for x in attention_inputs(1, 16, 9, dtype, count=4))
    out, lse = spatial_attention(query, key, value, 0.5)
    torch.library.opcheck(spatial_attention, (query, key, value, 0.5))
    torch.library.opcheck(spatial_attention_backward, (grad, query, key, value, out, lse, 0.5))
    torch.library.opcheck(spatial_attention_backward, (grad, query, key, None, out, lse, 0.5))


def test_compiles_in_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(query, key, value):
        return (
            spatial_attention(query, key, value, 0.5)[0].square().sum()
            + spatial_attention_shared(query, key, 1.0)[0].sum()
        )

    for length in (5, 9):
        inputs = [x.requires_grad_() for x in attention_inputs(1, length, 16)]
        compiled = torch.autograd.grad(loss(*inputs), inputs)
        plain = spatial_attention(*inputs, 0.5)[0].square().sum() + spatial_attention_shared(*inputs[:2], 1.0)[0].sum()
        for left, right in zip(compiled, torch.autograd.grad(plain, inputs), strict=True):
            assert torch.equal(left, right)


def test_cost_counts_the_tensors_it_names():
    query = torch.empty(2, 64, 32, dtype=torch.float16)
    assert attention.cost(query).bytes == 4 * 2 * 64 * 32 * 2 + 4 * 2 * 64
    assert attention.cost(query, shared=True).bytes == 3 * 2 * 64 * 32 * 2 + 4 * 2 * 64
    assert attention.cost(query).flops == 4 * 2 * 64 * 64 * 32
    assert attention.backward_cost(query).bytes == 8 * 2 * 64 * 32 * 2 + 4 * 2 * 64
    assert attention.backward_cost(query, shared=True).bytes == 6 * 2 * 64 * 32 * 2 + 4 * 2 * 64
    assert attention.backward_cost(query).flops == 10 * 2 * 64 * 64 * 32


@pytest.mark.skipif(not runtime.INTERPRETED, reason="the first of three kernels is launched alone, on the CPU")
def test_the_maxima_of_the_first_product_are_whole():
    """Factors from one maximum to another are powers of two: they cost the weights no digit, in fp16 above 2^-14."""
    query, length, keys = torch.randn(5, 32), 5, 16
    scores, largest, total = torch.zeros(5, keys), torch.zeros(5), torch.zeros(5)
    attention_products._scores_kernel[(1,)](
        query, query, scores, largest, total, length, 0, 0, length, 0.3,
        CHANNELS=32, QUERIES=16, KEYS=keys, DEPTH=32, num_warps=4, num_stages=1,
    )  # fmt: skip
    assert torch.equal(largest, (query @ query.T * 0.3).max(dim=1).values.ceil())
