"""Limits on the launches and bytes of the full Stable Diffusion network, counted on fake CUDA tensors."""

import functools
from pathlib import Path

import pytest
from fast.small_models import latents, pixels, smallest_model
from fastvae_kernels.shared.runtime import INTERPRETED
from support.short_run import short_run
from support.traffic import counted

import fastvae
from bench.timing import roofline
from fastvae.fast import cost_trace, explain

ROOT = Path(__file__).parents[2]
LIMITS = {"encoder": (105, 0.40), "decoder": (136, 0.38)}


@functools.cache
def total(name, frozen):
    return sum(roofline.count(name, 512, 8, frozen), cost_trace.NOTHING)


@pytest.mark.parametrize("name", LIMITS)
def test_the_full_network_stays_within_its_budget(name):
    """For 8 images of 512²: launches, and bytes as a share of eager's."""
    most, share = LIMITS[name]
    cost = total(name, frozen=True)
    assert cost.launches <= most
    assert cost.bytes <= share * roofline.EAGER[name][1]
    assert cost.flops > 8e12


@pytest.mark.parametrize("name", short_run(LIMITS, ["decoder"]))
def test_weights_that_may_move_cost_launches_but_hardly_bytes(name):
    """freeze=True saves layout changes and small folds: at most 1.5 % of the bytes."""
    frozen, free = total(name, True), total(name, False)
    assert free.launches > frozen.launches
    assert free.bytes < 1.015 * frozen.bytes


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(roofline.SIZES[:1], id="one size"),
        pytest.param(roofline.SIZES, id="every size", marks=pytest.mark.slow),
    ],
)
def test_the_documented_table_is_what_is_counted(sizes):
    documented = (ROOT / "docs" / "performance.md").read_text().splitlines()
    assert {*roofline.table(sizes=sizes).splitlines()} <= {*documented}, "run: python -m bench.timing.roofline"


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's own launches")
@pytest.mark.parametrize("frozen", [False, True])
def test_explain_says_the_launches_that_are_made(frozen):
    vae = fastvae.accelerate(smallest_model(), freeze=frozen)
    x = pixels(vae, 1, 10, 6)
    told = explain.explain(vae, tuple(x.shape)).launches
    if frozen:  # the first call packs
        vae.encoder(x)
    for name, call in (("encoder", lambda: vae.encoder(x)), ("decoder", lambda: vae.decoder(latents(vae, 1, 5, 3)))):
        with counted() as launches:
            call()
        assert len(launches) == sum(number for op, number in told[name].items() if op.startswith("fastvae::"))
