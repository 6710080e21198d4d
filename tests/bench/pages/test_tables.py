"""Tables and pictures of the pages agree with the results, and no other table has numbers."""

import json
import re
from pathlib import Path

import pytest
from fastvae_kernels.cpu import sources

from bench.pages import tables
from bench.timing.environment import source_hash

ROOT = Path(__file__).parents[3]

PAGE = "<!-- results: results.json {} -->\n<!-- end -->\n"
ORIGIN = {
    "dry": False, "device": "cpu", "processor": "a CPU", "driver": None, "threads": 2, "date": "2030-01-02",
    "commit": "0123456789abcdef", "kernel_sources": source_hash(), "cpu_sources": sources.source_hash(),
    "versions": {"torch": "9.9", "diffusers": "8.8", "openvino": None},
}  # fmt: skip
RESULT = ORIGIN | {
    "networks": {
        "one": {
            "part": "encoder", "preset": "sd15", "side": 256, "batch": 1, "dtype": "float32", "rounds": 7,
            "compiled": False, "floor_seconds": 0.4,
            "contestants": {
                "diffusers": {
                    "median_seconds": 1.1, "interval": [1.0, 1.2], "times_diffusers": 1.0, "error": 1e-6,
                    "share_of_floor": 0.36, "peak_bytes": None,
                },
                "fastvae": {
                    "median_seconds": 0.55, "interval": None, "times_diffusers": 2.0, "error": 0.0123,
                    "share_of_floor": 0.73, "peak_bytes": 2**30,
                },
                "OpenVINO": {"failed": "ModuleNotFoundError: no openvino"},
                "ONNX Runtime": {"left_out": "no bf16"},
            },
        }
    },
}  # fmt: skip


def written(tmp_path, result, table="encoder"):
    (tmp_path / "results.json").write_text(json.dumps(result))
    return tables.with_results(PAGE.format(table), tmp_path)


def test_the_encoders_table(tmp_path):
    text = written(tmp_path, RESULT)
    assert "| diffusers | 1100 | 1000 to 1200 | 1.00 | 1.0e-06 | 36 % | not measured |" in text
    assert "| fastvae | 550 | too few rounds | 2.00 | 1.23 % | 73 % | 1.00 GiB |" in text
    assert "| OpenVINO | failed: ModuleNotFoundError: no openvino |" in text
    assert "| ONNX Runtime | left out: no bf16 |" in text
    assert "2 threads of a CPU; torch 9.9, diffusers 8.8; commit 0123456789ab, 2030-01-02." in text
    assert tables.with_results(text, tmp_path) == text


def test_a_gpus_tables_have_device_time_and_wall_time(tmp_path):
    """Results from before the wall time was measured say so."""
    gpu = json.loads(json.dumps(RESULT)) | {"device": "a GPU", "driver": "1"}
    rows = gpu["networks"]["one"]["contestants"]
    rows["fastvae"]["wall_seconds"] = 0.6
    text = written(tmp_path, gpu)
    head = "| | device time, median, ms | 95 % interval | wall time, ms | times diffusers | error |"
    assert head in text
    assert "| fastvae | 550 | too few rounds | 600 | 2.00 |" in text
    assert "| diffusers | 1100 | 1000 to 1200 | not measured | 1.00 |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {9}
    gpu["networks"]["one"]["dtype"] = "bfloat16"
    rows["fastvae, frozen"] = rows["fastvae"] | {"wall_seconds": 0.5}
    assert "| encode 1 x 256² | 1100 | 550 | 2.00 | 550 | 2.00 | not measured |" in written(tmp_path, gpu, "networks")
    rows["diffusers"]["wall_seconds"] = 1.2
    assert "| 550 | 2.00 | 1200 / 600 / 500 |" in written(tmp_path, gpu, "networks")
    case = {
        "ours": "kernel", "median_seconds": {"ours": 1e-3}, "times_eager": {"NHWC": 2.0}, "share_of_roof": 0.5,
        "host_seconds": 1e-4,
    }  # fmt: skip
    text = written(tmp_path, gpu | {"cases": {"op": case}}, "ops")
    assert "| op | ours | device time, median, ms | Python's time, ms | share of the roof | times eager |" in text
    assert "| op | kernel | 1.000 | 0.100 | 50 % | 2.00 NHWC |" in text


def test_the_short_table_has_the_cases_in_bf16_that_all_three_ran(tmp_path):
    wide = RESULT["networks"]["one"]
    ours = wide["contestants"]["fastvae"]
    rows = {**wide["contestants"], "fastvae, frozen": ours | {"median_seconds": 0.5, "times_diffusers": 2.2}}
    cases = {
        "wide": wide | {"contestants": rows},
        "half": wide | {"part": "decoder", "dtype": "bfloat16", "contestants": rows},
        "left out": wide | {"dtype": "bfloat16", "contestants": rows | {"fastvae": {"left_out": "no time"}}},
    }
    text = written(tmp_path, RESULT | {"networks": cases}, "networks")
    assert "| decode 1 x 256² | 1100 | 550 | 2.00 | 500 | 2.20 | not measured |" in text
    assert "| encode" not in text
    assert text.count("commit 0123456789ab") == 2
    assert text.count("2 threads of a CPU") == 1


def test_the_origin_of_parts_with_other_versions(tmp_path):
    case = RESULT["networks"]["one"]
    rows = {**case["contestants"], "fastvae, frozen": case["contestants"]["fastvae"]}
    parts = {"decoder": {**ORIGIN, "versions": {"torch": "10"}, "passed": True}}
    cases = {"a": case | {"dtype": "bfloat16", "contestants": rows}}
    text = written(tmp_path, RESULT | {"networks": cases, "parts": parts}, "networks")
    assert "Encode: 2 threads of a CPU; torch 9.9, diffusers 8.8; commit 0123456789ab, 2030-01-02. " in text
    assert "Decode: 2 threads of a CPU; torch 10; commit 0123456789ab, 2030-01-02.\n" in text


def test_a_commit_with_changes_and_earlier_kernels(tmp_path):
    gpu = {"device": "a GPU", "driver": "1", "commit": "06d6227-dirty", "kernel_sources": "other"}
    text = written(tmp_path, RESULT | gpu)
    assert "commit 06d6227 with uncommitted changes, 2030-01-02, measured with earlier kernel sources.\n" in text
    assert "earlier kernel" not in written(tmp_path, RESULT | gpu | {"kernel_sources": source_hash()})
    assert "earlier kernel" not in written(tmp_path, RESULT | {"kernel_sources": "other"})


@pytest.mark.parametrize("cpu_sources", ["other", None])
def test_networks_on_a_cpu_with_earlier_c_kernels(tmp_path, cpu_sources):
    """Results from before the C kernels' hash was recorded have none."""
    earlier = {name: value for name, value in RESULT.items() if name != "cpu_sources"}
    if cpu_sources:
        earlier["cpu_sources"] = cpu_sources
    assert "2030-01-02, measured with earlier kernel sources.\n" in written(tmp_path, earlier)
    op = {"ours": "reference", "median_seconds": {"ours": 1e-3}, "times_eager": {"NHWC": 1.0}, "share_of_roof": 0.5}
    assert "earlier kernel" not in written(tmp_path, earlier | {"cases": {"op": op}}, "ops")


@pytest.mark.parametrize(
    ("status", "failed", "samples", "words"),
    [
        ("stopped after 72 s", [], 7, "The time limit of 72 s ended this part; each row with a time is complete"),
        ("stopped after 72 s", [], 6, "This part did not pass: stopped after 72 s."),
        ("stopped after 72 s", ["a test"], 7, "This part did not pass: stopped after 72 s."),
        ("FAILED (exit 1)", [], 7, "This part did not pass: FAILED (exit 1)."),
    ],
)
def test_the_end_of_a_part_that_did_not_pass(tmp_path, status, failed, samples, words):
    result = json.loads(json.dumps(RESULT))
    for row in result["networks"]["one"]["contestants"].values():
        row["seconds"] = [1.0] * samples
    part = {**ORIGIN, "passed": False, "status": status, "failed": failed}
    assert words in written(tmp_path, result | {"parts": {"encoder": part}})


def test_a_table_older_than_its_data_is_seen(tmp_path):
    text = written(tmp_path, RESULT)
    newer = json.loads(json.dumps(RESULT))
    newer["networks"]["one"]["contestants"]["fastvae"]["median_seconds"] = 0.5
    assert written(tmp_path, newer) != text


def test_a_missing_result_is_not_measured_yet(tmp_path):
    assert tables.NOT_YET in tables.with_results(PAGE.format("encoder"), tmp_path)
    for table in tables.TABLES:
        assert tables.NOT_YET in written(tmp_path, ORIGIN, table)


def test_dry_results_and_unknown_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is of a dry run"):
        written(tmp_path, RESULT | {"dry": True})
    with pytest.raises(ValueError, match="TABLE must be one of pipeline, ops"):
        written(tmp_path, RESULT, "nothing")


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_pages_agree_with_the_results(page):
    text = (ROOT / page).read_text()
    assert tables.SECTION.search(text)
    assert tables.with_results(text) == text, "run: make report"
    # Only sections of results and of counted costs (checked by tests/fast/test_budget.py) have tables of numbers.
    rest = tables.SECTION.sub("", text)
    while "<!-- roofline -->" in rest:
        before, _, after = rest.partition("<!-- roofline -->")
        rest = before + after.partition("<!-- end -->")[2]
    number = re.compile(r"(?<![A-Za-z])[0-9]")  # not the name jinja2
    loose = [line for line in rest.splitlines() if line.startswith("|") and number.search(line)]
    assert not loose, "a table of numbers without a result"


def test_the_pictures_are_of_these_results():
    made = tables.drawings()
    assert {f"docs/images/cpu-{part}.svg" for part in ("encoder", "decoder")} <= made.keys()
    for name, svg in made.items():
        assert (ROOT / name).read_text() == svg, f"{name} is older than its data, run: make report"
    there = {f"docs/images/{path.name}" for path in (ROOT / "docs" / "images").glob("*.svg")}
    ours = {name for name in there if name.rpartition("-")[2] in {f"{table}.svg" for table in tables.TABLES}}
    assert ours == made.keys(), "a picture without data"


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_picture_of_a_page_is_there(page):
    text = (ROOT / page).read_text()
    linked = [link for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) if "://" not in link]
    assert all(((ROOT / page).parent / link).is_file() for link in linked), linked
    shown = {link.removeprefix("images/") for link in linked}
    made = {Path(name).name for name in tables.drawings()}
    assert page != "docs/performance.md" or made <= shown, "a picture that no page shows"
