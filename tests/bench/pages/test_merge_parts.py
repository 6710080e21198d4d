"""merge_parts.py keeps the data, the commit and the status of every part of a device's results."""

import json
import re
from pathlib import Path

import pytest

from bench.pages import merge_parts, tables
from bench.timing.environment import source_hash

ROOT = Path(__file__).parents[3]


def facts(commit, **data):
    """Return the results file of a part."""
    empty = {name: {} for name in merge_parts.EMPTY}
    machine = {"commit": commit, "device": "A GPU", "driver": "1", "date": "2030-01-02", "versions": {"torch": "9"}}
    machine["kernel_sources"] = source_hash()
    return machine | {"dry": False, "passed": True, "failed": [], "roof": {"bytes": commit}} | empty | data


OP = {
    "times_eager": {"NHWC": 2.0},
    "ours": "kernel",
    "median_seconds": {"ours": 1e-3},
    "share_of_roof": 0.5,
    "host_seconds": 0,
}


def network(part, median):
    return {
        "part": part, "preset": "sd15", "side": 512, "batch": 8, "dtype": "bfloat16", "rounds": 9, "compiled": False,
        "floor_seconds": 0.01,
        "contestants": {"fastvae": {
            "median_seconds": median, "interval": [median, median], "times_diffusers": None, "error": 1e-3,
            "share_of_floor": 0.5, "peak_bytes": 2**30,
        }},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Results of a device's first run: encoder, decoder and ops of one commit."""
    write(tmp_path, "encoder", facts("first", networks={"e": network("encoder", 0.02)}))
    write(tmp_path, "decoder", facts("first", networks={"d": network("decoder", 0.04)}))
    write(tmp_path, "ops", facts("first", cases={"an op": OP}))
    assert run(tmp_path, "encoder=passed", "decoder=passed", "ops=passed")["passed"]
    return tmp_path


def write(folder, part, result):
    (folder / f"{part}.json").write_text(json.dumps(result))


def run(folder, *words):
    assert merge_parts.main([str(folder), *words]) == 0
    assert {path.name for path in folder.iterdir() if path.suffix == ".json"} == {"results.json"}
    return json.loads((folder / "results.json").read_text())


def test_a_part_run_again_replaces_its_own_data_alone(folder):
    write(folder, "encoder", facts("second", networks={"e2": network("encoder", 0.01)}))
    whole = run(folder, "encoder=passed")
    assert whole["networks"].keys() == {"e2", "d"}
    assert whole["cases"].keys() == {"an op"}
    assert {name: part["commit"] for name, part in whole["parts"].items()} == {
        "encoder": "second", "decoder": "first", "ops": "first"
    }  # fmt: skip
    assert whole["parts"]["decoder"]["roof"] == {"bytes": "first"}
    assert whole["commit"] == "second"


def test_compiled_networks_are_those_of_their_own_part(folder):
    """They stay when the encoder is measured again, and the encoder stays when they are."""
    slow = network("encoder", 0.03) | {"compiled": True}
    write(folder, "compile", facts("second", networks={"e compiled": slow}))
    assert run(folder, "compile=passed")["networks"].keys() == {"e", "d", "e compiled"}
    write(folder, "encoder", facts("third", networks={"e3": network("encoder", 0.01)}))
    assert run(folder, "encoder=passed")["networks"].keys() == {"e3", "d", "e compiled"}


def test_a_part_that_failed_or_wrote_nothing_is_kept_as_such(folder):
    write(folder, "ops", facts("second", passed=False, failed=["test_op[one]"], cases={"another": OP}))
    (folder / "tests.log").write_text("...\nFAILED tests/ops/test_tiles.py::test_it - AssertionError\nERROR a.py\n")
    whole = run(folder, "ops=FAILED (exit 1)", "tests=FAILED (exit 1)", "decoder=stopped after 9 s")
    assert whole["passed"] is False
    assert whole["parts"]["encoder"]["passed"] is True
    assert whole["parts"]["ops"]["failed"] == ["test_op[one]"]
    assert whole["parts"]["tests"]["failed"] == ["tests/ops/test_tiles.py::test_it", "a.py"]
    assert whole["parts"]["tests"]["commit"] == "second"
    # Its earlier numbers are not those of this commit.
    assert whole["networks"].keys() == {"e"}
    assert whole["parts"]["decoder"]["status"] == "stopped after 9 s"


@pytest.mark.parametrize("other", [{"device": "B GPU"}, {"dry": True}])
def test_results_of_something_else_are_not_mixed_in(folder, other):
    write(folder, "philox", facts("second", generator={"one": {}}) | other)
    whole = run(folder, "philox=passed")
    assert whole["parts"].keys() == {"philox"}
    assert whole["networks"] == whole["cases"] == {}


def test_parts_without_results_have_the_machines_facts(tmp_path):
    whole = run(tmp_path, "tests=passed", "--dry")
    assert whole["dry"] is True
    assert whole["passed"] is True
    assert whole["parts"]["tests"]["commit"] == whole["commit"]
    assert whole["parts"]["tests"]["versions"]["torch"]


def test_every_part_of_the_script_has_its_place(folder):
    script = (ROOT / "bench" / "device.sh").read_text()
    shares = next(line for line in script.splitlines() if line.startswith("declare -A share="))
    parts = re.findall(r"\[(\w+)\]=", shares)
    assert set(parts) - {"tests", "tune"} == merge_parts.DATA.keys()


def test_the_page_gets_a_section_for_the_device(folder, tmp_path):
    place = tmp_path / "root" / "bench" / "results" / "a-gpu"
    place.mkdir(parents=True)
    write(folder, "encoder", facts("second", networks={"e": network("encoder", 0.01)}))
    run(folder, "encoder=FAILED (exit 1)")
    (folder / "results.json").rename(place / "results.json")
    text = tables.with_results(f"<!-- results: {tables.RESULTS} devices -->\n<!-- end -->\n", tmp_path / "root")
    assert "### A GPU" in text
    assert "| fastvae | 10.0 | 10.0 to 10.0 |" in text
    assert "A GPU, driver 1; torch 9; commit second, 2030-01-02. This part did not pass: FAILED (exit 1)." in text
    assert "commit first, 2030-01-02.\n" in text, "the decoder's own commit"
    assert tables.with_results(text, tmp_path / "root") == text
    assert set(tables.drawings(tmp_path / "root")) == {
        f"docs/images/a-gpu-{part}.svg" for part in ("encoder", "decoder")
    }


def test_a_dry_run_beside_the_results_is_on_no_page(folder, tmp_path):
    place = tmp_path / "root" / "bench" / "results" / "dry"
    place.mkdir(parents=True)
    whole = json.loads((folder / "results.json").read_text()) | {"dry": True}
    (place / "results.json").write_text(json.dumps(whole))
    assert tables.drawings(tmp_path / "root") == {}
    text = tables.with_results(f"<!-- results: {tables.RESULTS} devices -->\n<!-- end -->\n", tmp_path / "root")
    assert tables.NOT_YET in text
