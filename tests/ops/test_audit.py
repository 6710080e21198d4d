"""The compile audit: the table in kernels/AUDIT.md is of these sources, and says what it must."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvae_kernels import tiles

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("audit", ROOT / "bench" / "audit.py")
audit = importlib.util.module_from_spec(specification)
sys.modules["audit"] = audit
specification.loader.exec_module(audit)


@pytest.fixture(scope="module")
def table():
    return audit.read_table()


def test_the_table_is_of_these_sources(table):
    assert table[0] == audit.source_hash(), "kernels or tiles have changed since: run `make audit`"


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


def is_short_attention_of_512(row):
    return row["kernel"] == "_attention_kernel" and " 512 " in row["case"]


def half_precision_products(rows):
    return [r for r in rows if r["kernel"] in PRODUCTS and r["target"] == "sm_90" and "bfloat16" in r["case"]]


def test_hopper_multiplies_by_wgmma_and_fp32_stays_fp32(table):
    """What the interpreter does not show: the default precision of a product of fp32 is tf32 on sm_90."""
    assert all(row["tf32"] == "False" for row in table[1])
    products = [row for row in half_precision_products(table[1]) if not is_short_attention_of_512(row)]
    assert products
    for row in products:
        assert "wgmma" in row["matrix instructions"], row


@pytest.mark.xfail(
    strict=True,
    reason="a tile of 64 queries that reads by pointers spills at 512 channels; under 4096 tokens 32 x 32 is chosen, "
    "which Triton multiplies by mma.sync; a kernel with bulk tensor copies would lift this",
)
def test_short_attention_of_512_channels_multiplies_by_wgmma(table):
    for row in filter(is_short_attention_of_512, half_precision_products(table[1])):
        assert "wgmma" in row["matrix instructions"], row


def test_the_sampler_takes_the_fast_sine_where_it_draws(table):
    drawing = [row for row in table[1] if row["kernel"] == "_sample_kernel" and row["target"] != "gfx942"]
    assert {row["case"] for row in drawing if row["fast sine"] == "True"} == {
        row["case"] for row in drawing if "mode" not in row["case"]
    }


SIZES = """
import sys
sys.path[:0] = [{bench!r}, {kernels!r}]
import audit, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
from fastvae_kernels import group_norm, group_norm_silu, pixels, residual, tiles, statistics
seen = {{}}
def take(kernel, *args, grid, warmup, **kwargs):
    launch = audit.describe(kernel, "", args, kwargs)
    seen.setdefault((launch.kernel, launch.constants.get("SILU"), launch.constants.get("PAD")), set()).add(launch.key)
JITFunction.run, tiles.target_of = take, lambda device: tiles.TARGETS["sm_90"]
with FakeTensorMode(), torch.device("cuda"):
    for index in range(30):
        batch, height, width = 1 + index % 5, 8 * (1 + index), 8 * (30 - index) + index % 3
        x = statistics.new_channels_last(batch, {channels}, height, width, like=torch.empty(0, dtype=torch.bfloat16))
        weight, picture = torch.empty({channels}).bfloat16(), torch.empty(batch, 3, height, width, dtype=torch.uint8)
        y, *moments = group_norm_silu.launch_forward(x, weight, weight, 8, 1e-6, True)
        group_norm_silu.launch_backward(y, x, weight, weight, *moments, True)
        scale, shift = group_norm.launch_affine(group_norm.launch_statistics(x), weight, weight, 8, 1e-6)
        group_norm.launch_scale_shift_silu(x, scale, shift)
        residual.launch(x, x, weight)
        residual.launch(x, x, weight, pad=1)
        pixels.launch(picture, torch.empty({channels}, 3, 3, 3).bfloat16(), weight)
print(max(len(keys) for keys in seen.values()), len(seen), {{n: len(k) for n, k in seen.items() if len(k) > 2}})
"""


@pytest.mark.parametrize("channels", [24, 128])
def test_thirty_sizes_compile_at_most_two_variants(channels):
    """In a process without the interpreter, on fake tensors: what Triton would key its compilations by."""
    script = SIZES.format(bench=str(ROOT / "bench"), kernels=str(ROOT / "kernels"), channels=channels)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    most, kernels, too_many = done.stdout.split(maxsplit=2)
    assert int(kernels) >= 10
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
    launch = audit.describe(Kernel, "case", given, {"WIDE": 64, "bias_ptr": None, "big": 2**31, "num_warps": 8})
    assert launch.signature == {
        "x_ptr": "*bf16", "size": "i32", "stride": "i32", "unit": "constexpr", "WIDE": "constexpr",
        "bias_ptr": "constexpr", "big": "i64",
    }  # fmt: skip
    assert launch.constants == {"unit": 1, "WIDE": 64, "bias_ptr": None}
    assert launch.divisible == ["x_ptr", "stride"]
    assert launch.options == {"num_warps": 8}
