"""targets.py says held where a bar is held, missed where it is missed, and neither where nothing was measured."""

import json
import re

import pytest

from bench.pages import targets as bars


def case(dtype, **medians):
    rows = {name.replace("_", ", "): {"median_seconds": taken} for name, taken in medians.items()}
    rows |= {"left out": {"left_out": "no bf16"}, "broken": {"failed": "no"}}
    return {"part": "encoder", "preset": "sd15", "side": 256, "batch": 1, "dtype": dtype, "contestants": rows}


def result(*cases):
    return {"networks": {str(number): case for number, case in enumerate(cases)}}


RESULT = result(
    case("float32", diffusers=0.9, fastvae=0.8, fastvae_frozen=0.75, rival=0.6),
    case("bfloat16", diffusers=0.45, fastvae=0.16, fastvae_frozen=0.15, rival=0.155),
)


def test_every_bar_is_computed_for_both_rows():
    told = {bar.words: line for bar, line in zip(bars.BARS, bars.lines(RESULT)[1:], strict=True)}
    assert {words: re.findall(r"[0-9.]+ (?:held|missed)", line) for words, line in told.items()} == {
        "bf16: 3 x diffusers in bf16": ["2.812 missed", "3.000 held"],
        "bf16: 3 x diffusers at its default, fp32": ["5.625 held", "6.000 held"],
        "bf16: ahead of all, or within 3 %": ["0.969 missed", "1.033 held"],
        "fp32: at most 1.35 x the best": ["0.750 held", "0.800 held"],
    }


@pytest.mark.parametrize(("ours", "held"), [(1.349, "held"), (1.351, "missed")])
def test_the_edge_of_a_bar(ours, held):
    said = bars.lines(result(case("float32", fastvae=ours, rival=1.0)))
    assert next(line for line in said if line.startswith("fp32")).endswith(held)


def test_what_was_not_measured_is_neither_held_nor_missed():
    for nothing in (result(), result(case("bfloat16")), result(case("bfloat16", rival=1.0))):
        table = "\n".join(bars.lines(nothing)[1:])
        assert "held" not in table
        assert "missed" not in table
        assert "not measured" in table


def test_a_missed_bar_is_no_failure(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULT))
    assert bars.main([str(path)]) == 0
    assert "missed" in capsys.readouterr().out
