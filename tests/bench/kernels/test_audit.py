"""The compile audit: the table in kernels/AUDIT.md is of these sources, and says what it must."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvae_kernels.shared import tiles

ROOT = Path(__file__).parents[3]


def load(name):
    """A module of bench/, which is no package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


audit, launches = load("audit"), load("launches")


@pytest.fixture(scope="module", params=audit.VERSIONS)
def table(request):
    """(hash, rows) as compiled under one Triton: each test holds under each."""
    sources, rows = audit.read_table()
    return sources, [row for row in rows if row["triton"] == request.param]


def test_the_table_is_of_these_sources():
    assert audit.read_table()[0] == audit.source_hash(), "kernels or tiles have changed since: run `make audit`"


def test_the_oldest_triton_and_the_newest_compile_the_same():
    """The oldest that the package takes, and the one that is pinned; the Makefile installs the oldest."""
    oldest, newest = audit.VERSIONS
    assert f'"triton>={oldest.removesuffix(".0")};' in (ROOT / "pyproject.toml").read_text()
    assert f"triton=={newest}\n" in (ROOT / "constraints.txt").read_text()
    assert re.search(r"^OLDEST_TRITON := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1] == oldest
    rows = audit.read_table()[1]
    compiled = [{tuple(r[name] for name in audit.NAMED) for r in rows if r["triton"] == v} for v in audit.VERSIONS]
    assert compiled[0] == compiled[1] != set()
    assert len(rows) == 2 * len(compiled[0])


def test_every_target_is_covered_alike(table):
    kernels = {target: {row["kernel"] for row in table[1] if row["target"] == target} for target in audit.AUDITED}
    assert all(found == kernels["sm_90"] for found in kernels.values())


def test_every_kernel_is_covered(table):
    """By name: what is decorated at the top of a module and named _..._kernel."""
    found = {row["kernel"] for row in table[1]}
    for path in audit.SOURCES.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("def _") and "_kernel(" in line:
                assert line[4:].split("(")[0] in found, f"{path.name}: no audit case launches it"


def test_every_pass_over_images_is_covered_in_every_dtype_and_at_odd_channels(table):
    """What the networks have, what fills no block, and chunks of 32 pixels."""
    wanted = {name for name, *_ in tiles.audited()}
    assert {name.split()[0] for name in wanted} == {"float32", "float16", "bfloat16"}
    assert {int(name.split("=")[1]) for name in wanted} >= {24, 48, 80, 96, 128, 256, 512, 1024}
    for kernel in ("_measure_kernel", "_scale_shift_kernel", "_normalize_kernel", "_gradient_sums_kernel",
                   "_input_gradient_kernel", "_residual_kernel", "_conv_in_kernel"):  # fmt: skip
        for target in audit.AUDITED:
            found = {row["case"] for row in table[1] if (row["kernel"], row["target"]) == (kernel, target)}
            assert wanted <= found, (kernel, target)


def test_nothing_spills_and_everything_fits(table):
    for row in table[1]:
        assert row["spilled bytes"] == "0", row
        assert int(row["shared bytes"]) <= tiles.TARGETS[row["target"]].shared_memory, row


def test_channels_of_half_precision_move_16_bytes_at_a_time(table):
    """Each kernel that passes over images, wherever the channels allow it."""
    passes = {
        "_measure_kernel",
        "_scale_shift_kernel",
        "_normalize_kernel",
        "_residual_kernel",
        "_input_gradient_kernel",
    }
    for row in table[1]:
        if row["kernel"] in passes:
            assert int(row["16-byte loads"]) > 0, row
        if row["kernel"] in passes - {"_measure_kernel"}:
            assert int(row["16-byte stores"]) > 0, row


def test_the_first_convolution_uses_the_matrix_units(table):
    for row in table[1]:
        if row["kernel"] == "_conv_in_kernel" and row["case"].startswith("bfloat16"):
            assert row["matrix instructions"] != "-", row


PRODUCTS = {"_attention_kernel", "_scores_kernel", "_weights_kernel", "_product_kernel", "_conv_in_kernel"}


def half_precision_products(rows):
    return [r for r in rows if r["kernel"] in PRODUCTS and r["target"] == "sm_90" and "bfloat16" in r["case"]]


def test_hopper_multiplies_by_wgmma_and_fp32_stays_fp32(table):
    """What the interpreter does not show: the default precision of a product of fp32 is tf32 on sm_90."""
    assert all(row["tf32"] == "False" for row in table[1])
    products = half_precision_products(table[1])
    assert products
    for row in products:
        # The first convolution is bound by memory: 16 pixels a tile, too few for wgmma, took half of the time of 64.
        if row["kernel"] != "_conv_in_kernel":
            assert "wgmma" in row["matrix instructions"], row


def test_every_product_of_attention_multiplies_by_wgmma_on_hopper(table):
    """At every number of channels, in both half precisions, forward and backward."""
    sources = [path.read_text() for path in audit.SOURCES.glob("attention*.py")]
    functions = [part for source in sources for part in source.split("\ndef ")[1:]]
    kernels = {part.split("(")[0] for part in functions if re.search(r"_kernel\(.*(tl\.dot|add_product)\(", part, re.S)}
    assert len(kernels) == 5
    rows = [row for row in table[1] if row["kernel"] in kernels and row["target"] == "sm_90"]
    rows = [row for row in rows if "float32" not in row["case"]]
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert "wgmma" in row["matrix instructions"], row


def test_the_sampler_takes_the_fast_sine_where_it_draws(table):
    drawing = [row for row in table[1] if row["kernel"] == "_sample_kernel" and row["target"] != "gfx942"]
    assert drawing
    for row in drawing:
        assert row["fast sine"] == str("mode" not in row["case"]), row


SIZES = """
import sys
sys.path[:0] = [{bench!r}, {kernels!r}]
import itertools, launches, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
from fastvae_kernels import group_norm, group_norm_silu, pixels, residual
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared import statistics
seen = {{}}
def take(kernel, *args, grid, warmup, **kwargs):
    launch = launches.describe(kernel, "", args, kwargs)
    variant = channels, launch.kernel, launch.constants.get("SILU"), launch.constants.get("PAD")
    seen.setdefault(variant, set()).add(launch.key)
JITFunction.run, tiles.target_of = take, lambda device: tiles.TARGETS["sm_90"]
with FakeTensorMode(), torch.device("cuda"):
    for index, channels in itertools.product(range(30), (24, 128)):
        batch, height, width = 1 + index % 5, 8 * (1 + index), 8 * (30 - index) + index % 3
        x = statistics.new_channels_last(batch, channels, height, width, like=torch.empty(0, dtype=torch.bfloat16))
        weight, picture = torch.empty(channels).bfloat16(), torch.empty(batch, 3, height, width, dtype=torch.uint8)
        y, *moments = group_norm_silu.launch_forward(x, weight, weight, 8, 1e-6, True)
        group_norm_silu.launch_backward(y, x, weight, weight, *moments, True)
        scale, shift = group_norm.launch_affine(group_norm.launch_statistics(x), weight, weight, 8, 1e-6)
        group_norm.launch_scale_shift_silu(x, scale, shift)
        residual.launch(x, x, weight)
        residual.launch(x, x, weight, pad=1)
        pixels.launch(picture, torch.empty(channels, 3, 3, 3).bfloat16(), weight)
print(max(len(keys) for keys in seen.values()), len(seen), {{n: len(k) for n, k in seen.items() if len(k) > 2}})
"""


def test_thirty_sizes_compile_at_most_two_variants():
    """In a process without the interpreter, on fake tensors: what Triton would key its compilations by."""
    script = SIZES.format(bench=str(ROOT / "bench"), kernels=str(ROOT / "kernels"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    most, kernels, too_many = done.stdout.split(maxsplit=2)
    assert int(kernels) >= 20, "of both numbers of channels"
    assert int(most) <= 2, too_many


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
    """A row as bench/kernels/launches.py leaves it."""
    fixed = dict.fromkeys(audit.COLUMNS, "8") | {"kernel": kernel, "target": "sm_90", "constants": "PAD=1 ROWS=64"}
    return {"triton": triton} | fixed | differing


def test_a_table_keeps_each_version_s_rows(tmp_path):
    rows = [measured("3.6.0", registers="120"), measured("3.9.0", registers="128")]
    rows += [measured(version, "_affine_kernel") for version in ("3.6.0", "3.9.0")]
    audit.write_table(rows, ("3.6.0", "3.9.0"), "abc", tmp_path / "AUDIT.md")
    lines = (tmp_path / "AUDIT.md").read_text().splitlines()
    assert [line.split(" | ")[6] for line in lines[-2:]] == ["8", "120 / 128"]
    sources, read = audit.read_table(tmp_path / "AUDIT.md")
    assert sources == "abc"
    assert sorted(map(str, read)) == sorted(map(str, rows))


@pytest.mark.parametrize("found", [("3.6.0",), ("3.6.0", "3.6.0"), ("3.6.0", "3.9.0", "3.9.0")], ids=" ".join)
def test_a_compilation_that_lacks_a_version_or_has_one_twice_is_refused(found):
    with pytest.raises(ValueError, match=r"_residual_kernel .* was compiled under .*, not once under each of"):
        audit.merge([measured(version) for version in found], ("3.6.0", "3.9.0"))


def test_the_wrong_triton_is_refused(tmp_path):
    """In place of a table that names one version and was compiled by another."""
    command = [sys.executable, str(ROOT / "bench" / "launches.py"), str(tmp_path / "rows.json"), "--triton", "3.5.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Triton 3.5.1 is to compile, and " in done.stderr
    assert not (tmp_path / "rows.json").exists()
