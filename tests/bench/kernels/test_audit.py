"""The compile audit: its rows are of these sources, cover every kernel, and hold no spill and no tf32."""

import re
import sys

import pytest
import torch
from fastvae_kernels.shared import tiles

from bench.kernels import audit, launches
from bench.timing.environment import ROOT, SOURCES

ROWS = audit.read_rows()


@pytest.fixture(params=audit.VERSIONS)
def rows(request):
    """The rows compiled under one Triton: each test holds under each."""
    return [row for row in ROWS if row["triton"] == request.param]


def test_the_summary_is_of_these_sources():
    assert audit.audited_sources() == audit.source_hash(), "kernels or tiles have changed since: run `make audit`"


def test_the_summary_is_of_the_rows():
    text = audit.SUMMARY.read_text()
    assert text == audit.summarize(ROWS, audit.audited_sources())
    assert len(text.splitlines()) <= 32 + len({row["kernel"] for row in ROWS})  # a line for each kernel


def test_the_summary_names_the_largest_figures():
    rows = [measured("3.6.0", **{"registers": "120", "matrix instructions": "wgmma"})]
    rows.append(
        measured("3.6.0", **{"registers": "99", "spilled bytes": "16", "matrix instructions": "-", "tf32": "True"})
    )
    text = audit.summarize(rows, "abc")
    assert "Sources: `abc`\n" in text
    assert "| sm_90 | 3.6.0 | 2 | 120 | 24 | 8 | 232448 | wgmma | 1 |\n" in text
    assert "| `_residual_kernel` | 2 | 120 | 24 | 8 | wgmma | 0 |\n" in text


def test_the_oldest_triton_and_the_newest_compile_the_same():
    """The oldest that the package takes, and the one that is pinned; the Makefile installs the oldest."""
    oldest, newest = audit.VERSIONS
    assert f'"triton>={oldest.removesuffix(".0")};' in (ROOT / "pyproject.toml").read_text()
    assert f"triton=={newest}\n" in (ROOT / "constraints.txt").read_text()
    assert re.search(r"^OLDEST_TRITON := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1] == oldest
    compiled = [{tuple(r[name] for name in audit.NAMED) for r in ROWS if r["triton"] == v} for v in audit.VERSIONS]
    assert compiled[0] == compiled[1] != set()
    assert len(ROWS) == 2 * len(compiled[0])


def test_every_target_is_covered_alike(rows):
    kernels = {target: {row["kernel"] for row in rows if row["target"] == target} for target in audit.AUDITED}
    assert all(found == kernels["sm_90"] for found in kernels.values())


def test_every_kernel_is_covered(rows):
    """By name: every function at the top of a file named _..._kernel."""
    found = {row["kernel"] for row in rows}
    lines = [(path, line) for path in SOURCES.rglob("*.py") for line in path.read_text().splitlines()]
    kernels = {line[4:].split("(")[0]: path for path, line in lines if line.startswith("def _") and "_kernel(" in line}
    assert len(kernels) > 20
    for kernel, path in kernels.items():
        assert kernel in found, f"{path.name}: no audit case launches {kernel}"


def test_every_pass_over_images_is_covered_in_every_dtype_and_at_odd_channels(rows):
    """The networks' channels, channels that fill no block, and chunks of 32 pixels."""
    expected = {name for name, *_ in tiles.audited()}
    assert {name.split()[0] for name in expected} == {"float32", "float16", "bfloat16"}
    assert {int(name.split("=")[1]) for name in expected} >= {24, 48, 80, 96, 128, 256, 512, 1024}
    for kernel in ("_measure_kernel", "_scale_shift_kernel", "_normalize_kernel", "_gradient_sums_kernel",
                   "_input_gradient_kernel", "_residual_kernel", "_conv_in_kernel"):  # fmt: skip
        for target in audit.AUDITED:
            found = {row["case"] for row in rows if (row["kernel"], row["target"]) == (kernel, target)}
            assert expected <= found, (kernel, target)


def test_nothing_spills_and_everything_fits(rows):
    for row in rows:
        assert row["spilled bytes"] == "0", row
        assert int(row["shared bytes"]) <= tiles.TARGETS[row["target"]].shared_memory, row


def test_channels_of_half_precision_move_16_bytes_at_a_time(rows):
    """Each kernel that passes over images, wherever the channels allow it."""
    passes = {
        "_measure_kernel",
        "_scale_shift_kernel",
        "_normalize_kernel",
        "_residual_kernel",
        "_input_gradient_kernel",
    }
    for row in rows:
        if row["kernel"] in passes:
            assert int(row["16-byte loads"]) > 0, row
        if row["kernel"] in passes - {"_measure_kernel"}:
            assert int(row["16-byte stores"]) > 0, row


def test_the_first_convolution_uses_the_matrix_units(rows):
    for row in rows:
        if row["kernel"] == "_conv_in_kernel" and row["case"].startswith("bfloat16"):
            assert row["matrix instructions"] != "-", row


PRODUCTS = {"_attention_kernel", "_scores_kernel", "_weights_kernel", "_product_kernel", "_conv_in_kernel"}


def half_precision_products(rows):
    return [r for r in rows if r["kernel"] in PRODUCTS and r["target"] == "sm_90" and "bfloat16" in r["case"]]


def test_hopper_multiplies_by_wgmma_and_fp32_stays_fp32(rows):
    """The interpreter does not show it: the default precision of a product of fp32 is tf32 on sm_90."""
    assert all(row["tf32"] == "False" for row in rows)
    products = half_precision_products(rows)
    assert products
    for row in products:
        # The first convolution is bound by memory: 16 pixels a tile, too few for wgmma, took half of the time of 64.
        if row["kernel"] != "_conv_in_kernel":
            assert "wgmma" in row["matrix instructions"], row


def test_every_product_of_attention_multiplies_by_wgmma_on_hopper(rows):
    """At every number of channels, in both half precisions, forward and backward."""
    sources = [path.read_text() for path in SOURCES.rglob("attention*.py")]
    functions = [part for source in sources for part in source.split("\ndef ")[1:]]
    kernels = {part.split("(")[0] for part in functions if re.search(r"_kernel\(.*(tl\.dot|add_product)\(", part, re.S)}
    assert len(kernels) == 5
    rows = [row for row in rows if row["kernel"] in kernels and row["target"] == "sm_90"]
    rows = [row for row in rows if "float32" not in row["case"]]
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert "wgmma" in row["matrix instructions"], row


def test_the_sampler_takes_the_fast_sine_where_it_draws(rows):
    drawing = [row for row in rows if row["kernel"] == "_sample_kernel" and row["target"] != "gfx942"]
    assert drawing
    for row in drawing:
        assert row["fast sine"] == str("mode" not in row["case"]), row


def test_an_aligned_tensor_and_a_size_are_described_as_triton_sees_them():
    class Parameter:
        def __init__(self, name, is_constexpr=False, do_not_specialize=False):
            self.name, self.is_constexpr, self.do_not_specialize, self.default = (
                name,
                is_constexpr,
                do_not_specialize,
                None,
            )

    class Kernel:
        params = (
            Parameter("x_ptr"), Parameter("size", do_not_specialize=True), Parameter("stride"), Parameter("unit"),
            Parameter("WIDE", is_constexpr=True), Parameter("bias_ptr"), Parameter("big", do_not_specialize=True),
        )  # fmt: skip
        arg_names = tuple(parameter.name for parameter in params)

        @staticmethod
        def fn():
            """Stands for the kernel's own function: its module and name are taken."""

    given = (torch.empty(2, dtype=torch.bfloat16), 32, 48, 1)
    launch = launches.describe(Kernel, "case", given, {"WIDE": 64, "bias_ptr": None, "big": 2**31, "num_warps": 8})
    assert launch.signature == {
        "x_ptr": "*bf16", "size": "i32", "stride": "i32", "unit": "constexpr", "WIDE": "constexpr",
        "bias_ptr": "constexpr", "big": "i64",
    }  # fmt: skip
    assert launch.constants == {"unit": 1, "WIDE": 64, "bias_ptr": None}
    assert launch.divisible == ["x_ptr", "stride"]
    assert launch.options == {"num_warps": 8}


def measured(triton, kernel="_residual_kernel", **differing):
    """A row as bench/kernels/launches.py writes it."""
    fixed = dict.fromkeys(audit.COLUMNS, "8") | {"kernel": kernel, "target": "sm_90", "constants": "PAD=1 ROWS=64"}
    return {"triton": triton} | fixed | differing


def test_the_rows_of_each_version_survive_the_file(tmp_path):
    rows = [measured("3.6.0", registers="120"), measured("3.9.0", registers="128")]
    rows += [measured(version, "_affine_kernel") for version in ("3.6.0", "3.9.0")]
    audit.write_rows(rows, ("3.6.0", "3.9.0"), tmp_path / "audit.csv")
    lines = (tmp_path / "audit.csv").read_text().splitlines()
    assert [line.split(",")[7] for line in lines[1:]] == ["8", "120 / 128"]
    assert sorted(map(str, audit.read_rows(tmp_path / "audit.csv"))) == sorted(map(str, rows))


def test_a_summary_without_a_hash_is_refused(tmp_path):
    (tmp_path / "AUDIT.md").write_text("# Compile audit\n")
    with pytest.raises(ValueError, match="has no hash of its sources"):
        audit.audited_sources(tmp_path / "AUDIT.md")


@pytest.mark.parametrize("found", [("3.6.0",), ("3.6.0", "3.6.0"), ("3.6.0", "3.9.0", "3.9.0")], ids=" ".join)
def test_a_compilation_that_lacks_a_version_or_has_one_twice_is_refused(found):
    with pytest.raises(ValueError, match=r"_residual_kernel .* was compiled under .*, not once under each of"):
        audit.merge([measured(version) for version in found], ("3.6.0", "3.9.0"))


def test_the_wrong_triton_is_refused(tmp_path, monkeypatch, capsys):
    """Else the table would name one version and hold the results of another."""
    monkeypatch.setattr(sys, "argv", ["launches", str(tmp_path / "rows.json"), "--triton", "3.5.1"])
    with pytest.raises(SystemExit) as end:
        launches.main()
    assert end.value.code == 2
    assert "Triton 3.5.1 is to compile, and " in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()
