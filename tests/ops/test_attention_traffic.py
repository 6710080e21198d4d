"""Attention's bytes and launches, counted in the interpreter, against `attention_products.traffic` and `cost`."""

import pytest
import torch
from fastvae_kernels import attention
from fastvae_kernels.parts import attention_products, attention_tiles
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.runtime import INTERPRETED
from support.thinned import thinned
from support.traffic import counted, launches_only

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's own loads and stores")

# (images, S, d), and the rows of scores that the workspace holds; chunks are of 128 queries
CASES = {
    "whole tiles": ((1, 256, 256), 1024),
    "ragged, channels that fill no power of two": ((2, 101, 80), 1024),
    "ragged: every image and chunk a round of its own": ((2, 150, 264), 1),
    "ragged: two images a round, the third alone": ((3, 150, 320), 256),
    "one position": ((3, 1, 264), 1024),
}


@pytest.fixture
def given(request, monkeypatch):
    """Query, key and value of a case, with its small chunks and workspace."""
    shape, rows = CASES[request.param]
    monkeypatch.setattr(attention_tiles, "CHUNK", 128)
    square = tiles.choose("attention_scores", dtype=torch.bfloat16, channels=shape[2], target=tiles.INTERPRETER)
    across = -(-shape[1] // square.columns) * square.columns
    monkeypatch.setattr(attention_tiles, "WORKSPACE", rows * across * 2)
    return torch.randn(3, *shape).bfloat16().unbind()


@pytest.mark.parametrize(("given", "form"), thinned(CASES, ["plain", "shared"]), indirect=["given"])
def test_programs_move_the_bytes_of_the_formula(given, form):
    query, key, value = given
    shared = form == "shared"
    with counted() as launches:
        attention.launch_shared(query, key, 0.1) if shared else attention.launch(query, key, value, 0.1)
    assert sum(launches) == attention_products.traffic(query, tiles.target_of(query.device))
    assert len(launches) == attention.cost(query, shared).launches


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("given", CASES, indirect=True)
def test_gradients_launch_what_their_cost_says(given, shared):
    query, key, value = given
    out, lse = attention.reference(query, key, value, 0.1)
    with launches_only() as launches:
        attention.launch_backward(out, query, key, None if shared else value, out, lse, 0.1)
    assert len(launches) == attention.backward_cost(query, shared).launches


def test_the_formula_as_the_docstring_writes_it():
    """At the tiles of sm_90, 512² and 512 channels."""
    query = torch.empty(8, 4096, 512, dtype=torch.bfloat16, device="meta")
    e, s, d, q, k, r, c = 2, 4096, 512, 128, 256, 128, 128
    scores = e * s * d * (s // k + s // q) + s * (s // k) * (e * k + 8)
    sums = s * (12 * (s // k) + 8)
    output = d // c * s * (e * s + 4 * (s // k) + 4) + e * s * d * (s // r + 1)
    assert attention_products.traffic(query, tiles.TARGETS["sm_90"]) == 8 * (scores + sums + output)


def test_the_bytes_of_a_program_do_not_depend_on_other_images():
    one, many = (torch.empty(images, 300, 264, dtype=torch.float16, device="meta") for images in (1, 7))
    once, seven = (attention_products.traffic(query, tiles.TARGETS["sm_90"]) for query in (one, many))
    assert seven == 7 * once
