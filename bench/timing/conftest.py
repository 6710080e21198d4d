"""Options and fixtures of the benchmarks: the device, its measured peak rates, and the results file."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# torch reads this at its first allocation: large tensors use 2 MiB pages, for every contestant that runs in torch. With
# pages of 4 KiB, new memory took a fifth of the time of a bf16 encode on two cores.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ruff: noqa: E402
import torch

from bench.timing.environment import surroundings
from bench.timing.stopwatch import Stopwatch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--results", default="", help="write the results to this JSON")
    parser.addoption("--dry", action="store_true", help="run a few tiny cases without measuring their speed")
    parser.addoption("--rivals", action="store_true", help="run the networks of make bench-cpu, on a CPU")
    parser.addoption("--encode-ms", type=float, help="rates of feeding an encoder that waits so long for an image")
    parser.addoption("--photographs", default="", help="a folder of JPEGs for those rates")
    parser.addoption("--without", action="append", default=[], help="leave this contestant out (may be repeated)")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        kind = next((name for name in ("dry", "rivals") if metafunc.config.getoption(name)), None)
        kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
        table = [pytest.param(case, marks=_lacking(kind, case.dtype)) for case in metafunc.module.TABLE[kind]]
        metafunc.parametrize("case", table, ids=lambda case: case.name.replace(" ", "-"))


def _lacking(kind: str, dtype: str) -> list[pytest.MarkDecorator]:
    """Return the mark that skips a case whose dtype this CPU has no instructions for: torch emulates it, in minutes."""
    if kind in ("cpu", "rivals") and dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return [pytest.mark.skip(reason="this CPU has no bf16 instructions")]
    return []


def pytest_configure(config):
    data = ("cases", "networks", "pipeline", "generator", "profiles", "loader", "feed", "resize", "winograd",
            "upsample", "roof")  # fmt: skip
    config.results = {**{name: {} for name in data}, "failed": []}
    if config.getoption("dry") or torch.cuda.is_available():
        # The settings of the tests, before the kernels are imported: the interpreter if there is no GPU, and its
        # fixes. A measurement on a CPU keeps its own threads and uses no interpreter.
        path = ROOT / "tests" / "conftest.py"
        specification = importlib.util.spec_from_file_location("settings_of_the_tests", path)
        assert specification is not None
        assert specification.loader is not None
        specification.loader.exec_module(importlib.util.module_from_spec(specification))


def pytest_runtest_logreport(report):
    if report.failed:
        _config.results["failed"].append(report.nodeid.split("::")[-1])
    if report.when == "teardown":  # the file has this case even if the next one is killed
        _write(_config, passed=False)


def pytest_sessionstart(session):
    global _config
    _config = session.config


def pytest_sessionfinish(session, exitstatus):
    _write(session.config, passed=exitstatus == 0)


_surroundings = functools.cache(surroundings)


def _write(config, passed):
    """Write the results so far. passed: the run has ended and no test failed."""
    path = config.getoption("results")
    if path:
        content = _surroundings() | {"dry": config.getoption("dry"), "passed": passed} | config.results
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_text(json.dumps(content, indent=1) + "\n")
        os.replace(f"{path}.tmp", path)


def row_text(row: dict[str, Any], dry: bool) -> str:
    """Return one contestant's row as text."""
    if "median_seconds" not in row:
        return "; ".join(f"{key.replace('_', ' ')}: {row[key]}" for key in ("left_out", "failed") if key in row)
    if dry:
        return "right"
    parts = [f"{1e3 * row['median_seconds']:9.2f} ms"]
    if row["interval"]:
        parts.append("[{:.2f}, {:.2f}]".format(*(1e3 * end for end in row["interval"])))
    if "wall_seconds" in row:
        parts.append(f"wall {1e3 * row['wall_seconds']:.2f} ms")
    if row["times_diffusers"]:
        parts.append(f"x{row['times_diffusers']:.2f} diffusers")
    if row.get("share_of_floor"):
        parts.append(f"{100 * row['share_of_floor']:.0f} % of the floor")
    return ", ".join(parts)


def forms_text(row: dict[str, Any], dry: bool) -> str:
    """Return a layer, or a network, in its forms as text."""
    if dry:
        return "right"
    if "contestants" in row:
        timed = {name: line for name, line in row["contestants"].items() if "median_seconds" in line}
        return ", ".join(f"{name} {1e3 * line['median_seconds']:.2f} ms" for name, line in timed.items())
    parts = [f"direct {1e6 * row['median_seconds']['direct']:.0f} µs"]
    parts += [f"{name} x{times:.2f}" for name, times in row["times_direct"].items() if name != "direct"]
    parts += [f"{name} {rate:.0f} TFLOP/s" for name, rate in row["tflops"].items()]
    parts += [f"{name} {100 * share:.0f} % of a copy" for name, share in row["share_of_copy_rate"].items()]
    return ", ".join(parts)


def pytest_terminal_summary(terminalreporter):
    results = terminalreporter.config.results
    dry = terminalreporter.config.getoption("dry")
    roof = {name: round(value["rate"] / 1e12, 3) for name, value in results["roof"].items()}
    if not dry:
        terminalreporter.write_line(f"roof measured in this run, TB/s and TFLOP/s: {roof}")
    for name, row in results["cases"].items():
        if dry:
            terminalreporter.write_line(f"{name:58} right")
            continue
        beside = " ".join(f"x{ratio:.2f} {layout}" for layout, ratio in row["times_eager"].items())
        terminalreporter.write_line(
            f"{name:58} {1e6 * row['median_seconds']['ours']:10.1f} µs {row['rate'] / 1e12:8.3f} {row['unit']:8} "
            f"{100 * row['share_of_roof']:5.1f} % of the roof, eager {beside}"
        )
    for name, entry in results["networks"].items():
        for contestant, row in entry["contestants"].items():
            terminalreporter.write_line(f"{name:44} {contestant:28} {row_text(row, dry)}")
    for contestant, row in results["pipeline"].get("contestants", {}).items():
        terminalreporter.write_line(f"{'pipeline':44} {contestant:28} {row_text(row, dry)}")
    for name, entry in results["profiles"].items():
        for contestant, row in entry["contestants"].items():
            ranked = sorted(row["groups"].items(), key=lambda item: -item[1])
            spent = ", ".join(f"{group} {1e3 * seconds:.2f}" for group, seconds in ranked[:6])
            terminalreporter.write_line(f"{name:44} {contestant:28} {'right' if dry else f'ms: {spent}'}")
    for name, row in results["loader"].items():
        rates = ", ".join(f"{who} {rate:.1f} images/s" for who, rate in row["images_per_second"].items())
        text = "right" if dry else f"{rates}: {100 * row['share_of_encoder']:.1f} % of the encoder"
        terminalreporter.write_line(f"{name:44} {text}")
    for name, row in results["feed"].items():
        for way, rates in row["ways"].items():
            warm, cold = (rates[f"{cache}_images_per_second"] for cache in ("warm", "cold"))
            text = "right" if dry else f"{warm:.1f} images/s, cold {cold:.1f}"
            terminalreporter.write_line(f"{'feed ' + name:44} {way:28} {text}")
    for name, row in (results["winograd"] | results["upsample"]).items():
        terminalreporter.write_line(f"{name:44} {forms_text(row, dry)}")
    for name, row in results["resize"].items():
        spent = ", ".join(f"{who} {1e6 * seconds:.0f} µs" for who, seconds in row["median_seconds"].items())
        text = "right" if dry else f"{spent}, {100 * row['share_of_copy_rate']:.0f} % of a copy"
        terminalreporter.write_line(f"{name:44} {text}")
    for name in results["failed"]:
        terminalreporter.write_line(f"FAILED {name}")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dry(request):
    return request.config.getoption("dry")


@pytest.fixture(scope="session")
def without(request):
    return request.config.getoption("without")


@pytest.fixture(scope="session")
def stopwatch(device, dry):
    return Stopwatch(device, rounds=1 if dry else 15, warm=not dry)


@pytest.fixture(scope="session")
def results(request):
    return request.config.results


@pytest.fixture(scope="session")
def roof(device, dry, stopwatch, results):
    """Peak rates of this device, measured in this run: bytes a second of a copy, FLOP/s of a product in each dtype."""

    # A CPU has a hundredth of a GPU's rates; 256 MB exceed its caches as 1 GB exceeds a GPU's.
    elements, side = (2**20, 128) if dry else (2**29, 8192) if device.type == "cuda" else (2**27, 2048)

    def copy() -> dict[str, Any]:
        source = torch.randn(elements, device=device).bfloat16()
        target = torch.empty_like(source)
        return {"work": 2 * source.numel() * source.element_size(), "call": lambda: target.copy_(source)}

    def product(dtype: torch.dtype) -> dict[str, Any]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return {"work": 2 * side**3, "call": lambda: left @ right}

    made = {"bytes": copy}
    dtypes = ["bfloat16", "float16", "float32"]
    if device.type == "cpu" and not dry:
        dtypes.remove("float16")  # no case uses it on a CPU
        dtypes = [name for name in dtypes if not _lacking("cpu", name)]
    made |= {name: lambda name=name: product(getattr(torch, name)) for name in dtypes}
    for name, make in made.items():
        measured = make()
        seconds = stopwatch.interleaved({"roof": [measured["call"]]})["roof"]
        # A peak rate is that of the fastest round.
        results["roof"][name] = {"rate": measured["work"] / min(seconds), "seconds": seconds}
        del measured
    return {name: value["rate"] for name, value in results["roof"].items()}
