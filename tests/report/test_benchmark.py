"""fastvae bench: contestants, refused arguments, and no time for a wrong result."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_store import small_vae

from fastvae.checkpoints import PRESETS, Preset
from fastvae.fast.cpu.group_norm import AccurateGroupNorm
from fastvae.report import benchmark as module
from fastvae.report import contestants
from fastvae.report.benchmark import benchmark, is_right
from fastvae.report.correctness import Truth, truth_of
from fastvae.system.strict_json import strict_json

LAYOUTS = (torch.contiguous_format, torch.channels_last)
pytestmark = pytest.mark.usefixtures("as_a_users_cpu")


def small(model, **options):
    return benchmark(model, **{"sizes": (16,), "dtype": "fp32", "device": "cpu", "seconds": 0, **options})


def rows(result, case=0):
    return {row["contestant"]: row for row in result["cases"][case]["rows"]}


def test_every_case_has_a_checked_time_of_every_contestant(small_model):
    said = []
    result = small(small_model, sizes=(16, 32), batches=(2,), dtype="bf16", say=said.append)
    assert [case["name"] for case in result["cases"]] == [
        "encode 2 x 16x16", "encode 2 x 32x32", "decode 2 x 16x16", "decode 2 x 32x32",
    ]  # fmt: skip
    for number, case in enumerate(result["cases"]):
        assert (case["rounds"], case["baseline"]) == (6, "diffusers")
        for row in rows(result, number).values():
            assert row["reason"] is None
            assert 0 < row["error"] <= row["allowed_error"]
            low, high = row["milliseconds_interval"]
            assert low <= row["milliseconds"] <= high
            # Two images a call; the reciprocal swaps the ends of the interval.
            assert row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
            assert row["images_per_second_interval"] == pytest.approx((2e3 / high, 2e3 / low))
            assert row["memory_bytes"] is None
            assert len(row["seconds"]) == 6
        assert rows(result, number)["diffusers"]["times_baseline"] == 1
    assert is_right(result)
    assert [row["reason"] for row in result["explain"]] == ["CPU: no fused kernel runs on this device"] * 2
    assert result["model"]["parameters"] == sum(p.numel() for p in small_vae().parameters())
    assert "Peak memory is not measured on a CPU." in result["notes"]
    assert said[0].startswith(f"bench   {small_model}  cpu  bf16  encode 2 x 16x16, ")
    assert strict_json(result)


def test_without_diffusers_the_plain_model_is_the_baseline(small_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = small(small_model, tasks=("encode",))
    assert rows(result)["diffusers"]["reason"] == "diffusers is not installed: pip install diffusers"
    assert rows(result)["diffusers"]["milliseconds"] is None
    assert result["cases"][0]["baseline"] == "fastvae, not accelerated"
    assert rows(result)["fastvae, not accelerated"]["times_baseline"] == 1


def test_a_diffusers_that_lacks_the_class_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    twin, reason = contestants.diffusers_twin(small_vae())
    assert twin is None
    assert reason == "diffusers' AutoencoderKL cannot be loaded: module 'diffusers' has no attribute 'AutoencoderKL'"


def accelerated_into(change):
    def accelerate(model):
        change(model)
        return model

    return accelerate


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.encoder.conv_out.weight.mul_(1.01), "wrong: its largest error is "),
        (lambda model: model.encoder.conv_out.bias.fill_(float("nan")), "wrong: its result in torch.float32 is not "),
        (
            lambda model: setattr(model, "quant_conv", torch.nn.Conv2d(8, 6, 1)),
            "wrong: its shape is (6, 2, 2), not (8,",
        ),
        (lambda model: setattr(model, "quant_conv", torch.nn.Conv2d(7, 8, 1)), "failed: "),
    ],
    ids=["one per cent off", "not finite", "another shape", "an error of torch's"],
)
def test_a_wrong_result_has_no_time(change, words, small_model, monkeypatch):
    monkeypatch.setattr(contestants, "accelerate", accelerated_into(change))
    monkeypatch.setattr(module, "explained", lambda *arguments: [])
    result = small(small_model, tasks=("encode",))
    row = rows(result)["fastvae"]
    assert words in row["reason"]
    assert row["milliseconds"] is row["images_per_second"] is row["times_baseline"] is None
    assert rows(result)["diffusers"]["milliseconds"] > 0
    assert not is_right(result)


def test_a_row_that_is_wrong_only_at_the_end_of_a_batch_is_seen():
    plain: Any = small_vae().eval()
    x = contestants.images(plain, 16, 3)
    assert not torch.equal(x[0], x[2])
    with torch.no_grad():
        truth = truth_of(plain, "encode", x)
        y = contestants.encoding(plain)(x)
    assert truth.judge(y)[2] is None
    y[2] += 1
    assert truth.judge(y)[2] is not None


def test_where_plain_torch_overflows_the_tolerance_is_bfloat16s():
    plain: Any = small_vae().eval()
    with torch.no_grad():
        plain.encoder.conv_in.weight.mul_(1e5)
        wide = truth_of(plain.to(torch.bfloat16), "encode", contestants.images(plain, 16, 1))
        x = contestants.images(plain.to(torch.float16), 16, 1)
        half = truth_of(plain, "encode", x)
        assert half.judge(contestants.encoding(plain)(x))[2] == (
            "wrong: its result in torch.float16 is not finite, so no time is given"
        )
    assert 0 < half.allowed < 100 * wide.allowed


def test_a_single_wrong_value_is_seen_and_so_is_a_small_error_everywhere():
    truth = Truth([0], torch.zeros(1, 4, 10, 10, dtype=torch.float64), allowed=0.1, allowed_rms=0.02)
    y = torch.full((1, 4, 10, 10), 0.015)
    assert truth.judge(y)[2] is None
    assert truth.judge(y + 0.01)[2] is not None  # far from the largest error allowed
    y[0, 3, 9, 9] = 0.11  # hardly changes the root mean square
    assert truth.judge(y)[2] == "wrong: its largest error is 0.11, so no time is given"


def test_a_norm_is_computed_in_nchw_and_keeps_the_layout():
    x = (torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 30).to(memory_format=LAYOUTS[1])
    with AccurateGroupNorm():
        y = F.group_norm(x, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, F.group_norm(x.contiguous(), 2))


def test_the_tolerance_is_that_of_the_tests():
    plain: Any = small_vae().eval()
    x = contestants.images(plain, 16, 1)
    with torch.no_grad(), AccurateGroupNorm():
        truth, run = truth_of(plain, "encode", x), contestants.encoding(plain)
        errors = [run(x.contiguous(memory_format=form)).double() - truth.values for form in LAYOUTS]
    eps, error = torch.finfo(torch.float32).eps, max(float(error.abs().max()) for error in errors)
    assert truth.allowed == pytest.approx(2 * error + eps * float(truth.values.abs().max()))
    rms, *of_errors = (float(values.square().mean().sqrt()) for values in (truth.values, *errors))
    assert truth.allowed_rms == pytest.approx(1.5 * max(of_errors) + eps * rms)
    assert of_errors[0] != of_errors[1], "both are looked at"


def test_the_built_in_model_in_fp32_has_a_time():
    """Its values are large compared with their spread, so torch's GroupNorm in channels_last loses digits."""
    result = benchmark("tiny", sizes=(64,), tasks=("encode",), dtype="fp32", device="cpu", seconds=0)
    assert is_right(result), rows(result)["fastvae"]["reason"]


def test_infinite_weights_accept_no_result():
    plain: Any = small_vae().eval()
    x = contestants.images(plain, 16, 1)
    with torch.no_grad():
        right = contestants.encoding(plain)(x)
        plain.encoder.conv_in.weight.fill_(float("inf"))
        assert truth_of(plain, "encode", x).judge(right)[2] is not None


def test_torch_compile_takes_part_when_asked(small_model, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: given.append(options) or run)
    result = small(small_model, tasks=("encode",), compiled=True)
    assert given == [{"dynamic": False}]
    assert rows(result)["torch.compile"]["times_baseline"] > 0
    assert "No time includes compiling." in result["notes"]


def test_a_missing_compiler_is_a_reason(small_model, monkeypatch):
    def missing(x):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\n\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda run, **options: missing)
    result = small(small_model, tasks=("encode",), compiled=True)
    assert rows(result)["torch.compile"]["reason"] == "failed: InvalidCxxCompiler: no working C++ compiler"
    assert is_right(result)


def test_peak_memory_is_what_a_call_needs_on_top(monkeypatch):
    happened = []
    monkeypatch.setattr(module, "synchronised", lambda device: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: happened.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    on_a_gpu: Any = types.SimpleNamespace(device=torch.device("cuda"))

    def run(x):
        happened.append("run")
        return x

    assert module.peak_bytes(run, on_a_gpu) == 250
    assert happened == ["wait", "reset", "run", "wait"]


def test_a_preset_has_random_weights_alike_every_time(monkeypatch):
    config = dict(small_vae().config)
    monkeypatch.setitem(PRESETS, "small", Preset("small", "AutoencoderKL", "none", config, "here"))
    one, weights = contestants.open_fp32("small", None, None)
    two, _ = contestants.open_fp32("small", None, None)
    assert weights.startswith("random")
    assert torch.equal(one.encoder.conv_in.weight, two.encoder.conv_in.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": (36,)}, "size must be a multiple of the model's 8 pixels per latent, got 36"),
        ({"sizes": (16, 4)}, "size must be a multiple of the model's 8 pixels per latent, got 4"),
        ({"batches": (10**12,)}, "in batches of 1000000000000 needs about .* GiB, and cpu has .* [GM]iB"),
        ({"device": "gpu"}, "device must be one of this machine's"),
    ],
    ids=["no multiple", "the second of two", "more than the memory", "no such device"],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(options, words, small_model):
    with pytest.raises(ValueError, match=words):
        small(small_model, **options)
