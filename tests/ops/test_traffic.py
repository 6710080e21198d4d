"""Traffic: bytes that the kernels load and store, counted in the interpreter, against `cost`."""

import pytest
import torch
from fastvae_kernels import group_norm, group_norm_silu, interleave, pixels, residual, resize, winograd
from fastvae_kernels.shared import statistics
from fastvae_kernels.shared.runtime import INTERPRETED, size_in_bytes
from fastvae_kernels.shared.winograd_matrices import FORMS
from support.short_run import short_run
from support.traffic import counted

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's own loads and stores")


def image(channels=128, height=16, width=32, dtype=torch.bfloat16):
    return statistics.same_layout(torch.randn(1, channels, height, width).to(dtype))


CASES = {
    "statistics": (group_norm.group_norm_statistics, group_norm.statistics_cost, lambda: (image(),)),
    "statistics of 96 channels, which fill no power of two": (
        group_norm.group_norm_statistics, group_norm.statistics_cost, lambda: (image(96),),
    ),
    "scale and shift": (
        group_norm.scale_shift_silu, group_norm.scale_shift_cost, lambda: (image(), *torch.randn(2, 1, 128)),
    ),
    "scale and shift of 96 channels": (
        group_norm.scale_shift, group_norm.scale_shift_cost, lambda: (image(96), *torch.randn(2, 1, 96)),
    ),
    "residual": (residual.residual_add, residual.cost, lambda: (image(), image(), *torch.randn(2, 128).bfloat16())),
    "residual into a padded buffer": (
        residual.residual_add, residual.cost, lambda: (image(), image(), *torch.randn(2, 128).bfloat16(), 1),
    ),
    "interleaving": (interleave.upsample_interleave, interleave.cost, lambda: (image(512, 9, 17),)),
    "group norm with SiLU": (
        lambda *values: group_norm_silu.group_norm_silu(*values, 32, 1e-6),
        group_norm_silu.cost,
        lambda: (image(), *torch.randn(2, 128).bfloat16()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_passes_move_the_bytes_of_their_cost(case):
    op, cost, make = CASES[case]
    given = make()
    with counted() as launches:
        op(*given)
    must = cost(*given)
    assert len(launches) == must.launches
    assert must.bytes * 0.999 <= sum(launches) <= must.bytes * 1.05, f"{sum(launches)} for {must.bytes}"


def test_the_backward_moves_the_bytes_of_its_cost():
    x, dy, weight, bias = image(), image(), *torch.randn(2, 128).bfloat16()
    moments = group_norm_silu.moments_reference(x, 32, 1e-6, bias)
    with counted() as launches:
        group_norm_silu.launch_backward(dy, x, weight, bias, *moments, True, bias)
    must = group_norm_silu.backward_cost(x, weight, bias)
    assert len(launches) == must.launches
    # The sums of each chunk, 2.4 %, and the vectors of each program's channels, which the cache has.
    assert must.bytes <= sum(launches) <= must.bytes * 1.05


def test_partials_cost_what_the_affine_says():
    partials = torch.randn(2, 150, 3, 32).abs()
    weight, bias = torch.randn(2, 32)
    with counted() as launches:
        group_norm.group_norm_affine(partials, weight, bias, 8, 1e-6)
    must = group_norm.affine_cost(partials, weight, bias)
    assert len(launches) == must.launches
    assert must.bytes * 0.95 <= sum(launches) <= must.bytes * 1.05


def test_pixels_are_read_again_only_as_the_formula_says():
    """Besides the cost, each program reads the weights of its channels, and its pixels with a line on either side."""
    picture = torch.randint(0, 256, (1, 24, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    weight, bias = torch.randn(128, 3, 3, 3).bfloat16(), torch.randn(128).bfloat16()
    with counted() as launches:
        pixels.pixels_conv_in(picture, weight, bias)
    must = pixels.cost(picture, weight, bias)
    chunk = statistics.chunk_pixels(128)
    programs = 24 * 32 // chunk * 2
    again = programs * (weight.nbytes // 2 + (chunk + 2 * 33) * 3)
    assert len(launches) == must.launches
    assert must.bytes <= sum(launches) <= must.bytes * 1.05 + again


@pytest.mark.parametrize("form", short_run(FORMS, ["winograd4"]))
def test_winograd_moves_its_cost_to_the_byte(form):
    """Two strips of a row of tiles each. Besides the cost, each program reads the vectors and the pixels around its
    tiles: here a line of the other strip, and with two programs a strip a column of the other program."""
    tile, channels, results, programs = FORMS[form].tile, 24, 16, {"winograd2": 2, "winograd4": 1}[form]
    x = image(channels, 2 * tile, 128 // tile, dtype=torch.float32)
    weights, gain = winograd.transform_weights(torch.randn(results, channels, 3, 3), FORMS[form])
    residual, bias, other = (
        image(results, *x.shape[2:], dtype=torch.float32),
        torch.randn(results),
        torch.randn(results),
    )
    given = x, *torch.randn(2, 1, channels), weights, gain, bias, residual, other, 1
    with counted() as launches:
        winograd.winograd_conv(*given, workspace=1)
    must = winograd.cost(*given, workspace=1)
    products = 4 * len(weights) * 2 * 128 // tile**2 * (channels + results) + 2 * size_in_bytes(weights)
    lines, columns = tile + 1, x.shape[3] + 2 * (programs - 1)
    again = 4 * channels * 2 * lines * columns - size_in_bytes(x)
    again += (2 * programs - 1) * size_in_bytes(*given[1:3]) + size_in_bytes(gain, bias, other)
    assert len(launches) + 2 == must.launches
    assert sum(launches) == must.bytes - products + again


@pytest.mark.parametrize("scaled", [(8, 20), (8, 60)], ids=["horizontal first", "vertical first"])
def test_resizing_moves_its_cost_to_the_byte(scaled):
    """Besides the cost, each program reads the weights of its pass, and 8 and 4 of the fields of its row."""
    crop = resize.Crop(7, (90, 61), scaled, (0, 1))
    given = torch.randint(0, 256, (20_000,), dtype=torch.uint8), *resize.plan([crop], (8, 18))
    with counted() as launches:
        resize.resize_lanczos(*given)
    must = resize.cost(*given)
    rows, blocks, weights = given[1:4]
    taps = {"y": int(rows[0, 7]), "x": int(rows[0, 9])}
    tables = {"y": 4 * 8 * (1 + taps["y"]), "x": 4 * 18 * (1 + taps["x"])}
    assert sum(tables.values()) == size_in_bytes(weights)
    first = tables["y" if rows[0, 5] else "x"]
    assert len(launches) == must.launches
    assert sum(launches) == must.bytes + (len(blocks) - 1) * first + 64 * len(blocks) + 32 - size_in_bytes(rows)
