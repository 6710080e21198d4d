"""Compiled variants: a new size of image compiles nothing, or one variant more where Triton sees divisibility."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ATTENTION = {
    "_scores_kernel",
    "_combine_kernel",
    "_product_kernel",
    "_delta_kernel",
    "_weights_kernel",
    "_grad_query_kernel",
    "_grad_keys_kernel",
}


def counted(forks, *cases):
    """Return {case: {variant: count}} from one process without the interpreter."""
    done = forks.run(ROOT / "tests" / "support" / "compiled_variants.py", *cases)
    assert done.returncode == 0, done.stderr
    return {case: {tuple(variant): n for variant, n in found} for case, found in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def found(forks):
    return counted(forks, "passes", "posterior", "attention:512:bfloat16")


def test_thirty_sizes_compile_one_variant_of_each_pass(found):
    found = found["passes"]
    assert len(found) >= 20, "of both numbers of channels"
    assert max(found.values()) == 1, {variant: n for variant, n in found.items() if n > 1}


def test_eight_sizes_compile_two_variants_one_for_each_memory_format(found):
    found = found["posterior"]
    assert len({variant[0] for variant in found}) == 5, "sample, divergence and sum, and two gradients"
    assert len(found) == 2 * 3 * (2 * 3 + 3), "dtypes, channels; the sampler's kernels in mode, by row and by stream"
    assert max(found.values()) == 2


def test_thirty_lengths_compile_at_most_two_variants(found):
    _attention_has_two(found["attention:512:bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["attention:512:float32", "attention:48:bfloat16"])
def test_thirty_lengths_compile_at_most_two_variants_elsewhere(case, forks):
    _attention_has_two(counted(forks, case)[case])


def _attention_has_two(found):
    assert {variant[0] for variant in found} == ATTENTION
    assert max(found.values()) <= 2
