"""Profiles: the group of every operator and kernel, complete totals, and pictures that agree."""

import ast
import contextlib
import json
import re
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch.autograd import profiler_util

from bench.pages import bar_svg as pictures
from bench.pages import tables
from bench.timing import profiles

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        # torch's operators on a CPU
        ("aten::mkldnn_convolution", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("mkldnn::_convolution_pointwise_", "convolution + residual"),
        ("aten::native_group_norm", "GroupNorm"),
        ("aten::silu_", "SiLU"),
        ("aten::add", "residual and bias"),
        ("aten::addmm", "attention and products"),
        ("aten::matmul", "attention and products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention and products"),
        ("aten::copy_", "copies"),
        ("aten::fill_", "copies"),
        ("aten::constant_pad_nd", "copies"),
        ("aten::upsample_nearest2d", "upsampling"),
        ("aten::empty", "other"),
        (profiles.OUTSIDE, profiles.OUTSIDE),
        # kernels of cuDNN, cuBLAS and ATen
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16>", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, 0, 0>", "copies"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "attention and products"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention and products"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>", "GroupNorm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
         "residual and bias"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::(anonymous namespace)::silu_kernel>", "SiLU"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        # ours
        ("_scale_shift_kernel", "fused: scale shift"),
        ("_conv_in_kernel", "fused: conv in"),
        ("_attention_kernel", "fused: attention"),
    ],
)  # fmt: skip
def test_the_group_of_a_name(name, group):
    assert profiles.group(name) == group


def test_every_kernel_of_ours_is_a_group_of_its_own():
    named = []
    for path in sorted((ROOT / "kernels" / "fastvae_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                named.append(node.name)
    assert len(named) > 15
    assert all(profiles.group(name).startswith(profiles.FUSED) for name in named), named


def test_the_parts_of_a_call_are_the_whole_call():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.GroupNorm(4, 16), torch.nn.SiLU())
    x = torch.randn(2, 8, 24, 24)
    with torch.no_grad():
        model(x)
        taken = profiles.spent(lambda: model(x), torch.device("cpu"))
    row = profiles.row(taken)
    assert {"convolution", "GroupNorm", "SiLU", profiles.OUTSIDE} <= row["groups"].keys()
    assert row["seconds"] == pytest.approx(sum(row["groups"].values()))
    assert all(seconds >= 0 for seconds in row["groups"].values())
    assert taken["aten::native_group_norm"][1] == 1
    longest = [entry["seconds"] for entry in row["longest"]]
    assert longest == sorted(longest, reverse=True)


def test_on_a_gpu_kernels_count_and_neither_operators_nor_annotations(monkeypatch):
    """The rows of operators and of named ranges repeat the time of their kernels."""

    def event(key, device_type, seconds, named=False):
        averages = profiler_util.FunctionEventAvg()
        averages.key, averages.device_type, averages.count = key, device_type, 2
        averages.self_device_time_total, averages.is_user_annotation = 1e6 * seconds, named
        return averages

    events = [
        event("aten::copy_", torch.profiler.DeviceType.CPU, 0.5),
        event("_scale_shift_kernel", torch.profiler.DeviceType.CUDA, 0.3),
        event("Memcpy DtoD (Device -> Device)", torch.profiler.DeviceType.CUDA, 0.2),
        event("somebody's range", torch.profiler.DeviceType.CUDA, 0.5, named=True),
    ]
    called = []
    recorded = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profiles, "profile", lambda **named: contextlib.nullcontext(recorded))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: called.append("waited"))
    taken = profiles.spent(lambda: called.append("called"), torch.device("cuda"))
    assert taken == {"_scale_shift_kernel": (0.3, 2), "Memcpy DtoD (Device -> Device)": (0.2, 2)}
    assert called == ["called", "waited"], "the kernels are done before the profiler stops"


def test_the_middle_call_is_taken_whole():
    calls = [{"a": (seconds, 1), "b": (0.5, 1)} for seconds in (3.0, 1.0, 2.0)]
    assert profiles.middle(calls) is calls[2]


def entry(**rows):
    contestants = {name: {"seconds": sum(groups.values()), "groups": groups} for name, groups in rows.items()}
    case = {"part": "encoder", "preset": "sd15", "side": 512, "batch": 8, "dtype": "bfloat16"}
    return case | {"counted": "kernels", "calls": 3, "contestants": contestants}


EAGER = {"convolution": 0.02, "SiLU": 0.01, "copies": 0.0001, "GroupNorm": 0.009}
OURS = {"convolution": 0.0125, "fused: residual": 0.003, "other": 0.0001}
ENTRY = entry(eager=EAGER, fastvae=OURS)


def test_small_groups_are_shown_with_the_others_and_nothing_is_lost():
    told = profiles.shown(ENTRY["contestants"])
    assert list(told["eager"]) == list(told["fastvae"])
    assert "copies" not in told["eager"], "a quarter of a percent"
    assert list(told["eager"])[-1] == profiles.OTHER
    for name, row in ENTRY["contestants"].items():
        assert sum(told[name].values()) == pytest.approx(row["seconds"])


def test_the_table_of_a_profile(tmp_path):
    origin = {
        "dry": False, "device": "A GPU", "driver": "1", "commit": "0123456789abcdef", "date": "2030-01-02",
        "kernel_sources": "abc", "versions": {"torch": "9.9"}, "profiles": {"one": ENTRY},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(origin))
    text = tables.with_results("<!-- results: results.json profile -->\n<!-- end -->\n", tmp_path)
    assert "**encoder, sd15, 8 x 512², bf16** (ms in kernels; of 3 calls the middle one)" in text
    assert "| | eager | fastvae |\n|---|---|---|\n| convolution | 20.0 (51 %) | 12.5 (80 %) |" in text
    assert "| fused: residual | 0.000 (0 %) | 3.000 (19 %) |" in text
    assert "| together | 39.1 | 15.6 |" in text
    assert tables.with_results(text, tmp_path) == text


def widths(svg):
    """Return (tooltip, length) of each bar."""
    name = "{http://www.w3.org/2000/svg}"
    drawn = ElementTree.fromstring(svg).iter(f"{name}rect")
    return {bar.findtext(f"{name}title", ""): float(bar.get("width", "nan")) for bar in drawn}


def test_the_bars_of_a_profile_are_as_long_as_its_times():
    drawn = widths(pictures.stacks([ENTRY]))
    by_time = {label: float(re.findall(r"([\d.]+) ms", label)[0]) for label in drawn if " ms" in label}
    scale = drawn["eager, convolution: 20.0 ms"] / 20
    for words, time in by_time.items():
        assert drawn[words] == pytest.approx(scale * time, abs=0.2), words
    assert sum(drawn[words] for words in by_time if words.startswith("eager")) == pytest.approx(
        pictures.WIDTH - pictures.LABELS - pictures.NUMBERS, abs=0.5
    )
    colours = re.findall(
        r'fill="(#\w+)"><title>(?:eager|fastvae), ([^:]+(?:: \w+)?): [\d.]+ ms', pictures.stacks([ENTRY])
    )
    assert len({colour for colour, _ in colours}) == len({label for _, label in colours}), "a colour is one group"


def test_the_bars_of_medians_and_their_whiskers():
    row = {"median_seconds": 0.2, "interval": [0.1, 0.4]}
    rows = {"a <contestant>": row, "fastvae": {"median_seconds": 0.1, "interval": None}, "nobody": {"left_out": "no"}}
    case = {"part": "encoder", "preset": "sd15", "side": 256, "batch": 1, "dtype": "float32", "compiled": False}
    svg = pictures.medians([case | {"contestants": rows}])
    drawn = widths(svg)
    assert drawn["a <contestant>: 200 ms"] == pytest.approx(2 * drawn["fastvae: 100 ms"], abs=0.1)
    assert "nobody" not in svg
    ends = [float(x) for x in re.findall(r'<line x1="([\d.]+)" x2="\1"', svg)]
    assert len(ends) == 2, "one interval: fastvae has none"
    assert ends[1] - pictures.LABELS == pytest.approx(2 * drawn["a <contestant>: 200 ms"], abs=0.2)
    assert svg == pictures.medians([case | {"contestants": rows}]), "the same figures, the same bytes"
