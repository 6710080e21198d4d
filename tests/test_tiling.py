"""Tile plans, and blended tiling with and without slivers."""

import pytest
import torch

from fastvae.tiling import TilePlan, apply_tiled, blend


def test_the_plan_of_diffusers():
    plan = TilePlan.of(1024, 128, 0.25)
    assert (plan.stride, plan.blend, plan.limit) == (768, 32, 96)
    assert plan.starts(1544) == [0, 768, 1536]  # the last tile is 8 pixels wide
    assert TilePlan.of(1024, 128, 0.25, slivers=False).starts(1544) == [0, 768]


@pytest.mark.parametrize("size", [1, 7, 64, 65, 100, 111, 112, 113, 160, 161, 500])
def test_without_slivers_tiles_cover_and_are_wider_than_the_overlap(size):
    plan = TilePlan.of(64, 64, 0.25, slivers=False)
    starts = plan.starts(size)
    ends = [min(start + 64, size) for start in starts]
    assert starts[0] == 0
    assert ends[-1] == size
    assert all(following <= end for following, end in zip(starts[1:], ends, strict=False))
    if len(starts) > 1:
        assert ends[-1] - starts[-1] > 64 - 48


@pytest.mark.parametrize("slivers", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (65, 100), (113, 7), (200, 161)])
def test_tiles_of_the_identity_blend_to_the_image(size, slivers):
    """Tiles that agree are changed by roundings alone: one for each product, for the sum, and for each weight."""
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    whole = apply_tiled(lambda tile: tile.clone(), x, TilePlan.of(64, 64, 0.25, slivers))
    assert whole.shape == x.shape
    assert (whole - x).abs().max() <= 8 * torch.finfo(torch.float64).eps


def test_without_slivers_equals_its_definition():
    """A pixel is a mixture of the tiles that cover it, weighted by its distance from the start of the later tile."""
    tile, overlap = 8, 2
    plan = TilePlan.of(tile, tile, overlap / tile, slivers=False)
    width = 19
    x = torch.arange(width, dtype=torch.float64).expand(1, 1, 1, width).contiguous()
    # Each tile is filled with its own number.
    numbers = iter(range(100))
    got = apply_tiled(lambda t: torch.full_like(t, next(numbers)), x, plan)[0, 0, 0]
    starts = plan.starts(width)
    expected = torch.empty(width, dtype=torch.float64)
    for i, start in enumerate(starts):
        for column in range(start, min(start + tile, width)):
            inside = column - start
            if i > 0 and inside < overlap:
                expected[column] = (i - 1) * (1 - inside / overlap) + i * (inside / overlap)
            else:
                expected[column] = i
    assert torch.equal(got, expected)


def test_blending_does_not_change_its_inputs():
    a, b = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)
    kept = a.clone(), b.clone()
    blend(a, b, 3, dim=2)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


@pytest.mark.parametrize(("tile", "factor"), [(1, 0.25), (8, 1.0), (8, 1.5), (8, -0.1)])
def test_tiles_that_do_not_advance_are_refused(tile, factor):
    with pytest.raises(ValueError, match="do not advance"):
        TilePlan.of(tile, tile, factor)
