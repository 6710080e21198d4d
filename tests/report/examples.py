"""Results in the format of ``fastvae bench``, with made-up numbers."""

from typing import Any


def row(contestant: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    interval = (0.9 * milliseconds, 1.2 * milliseconds)
    return {
        "contestant": contestant,
        "reason": None,
        "error": 0.0123,
        "allowed_error": 0.05,
        "milliseconds": milliseconds,
        "milliseconds_interval": interval,
        "images_per_second": 1e3 / milliseconds,
        "images_per_second_interval": (1e3 / interval[1], 1e3 / interval[0]),
        "times_baseline": 40 / milliseconds,
        "memory_bytes": 123_456_789,
        **more,
    }


def result() -> dict[str, Any]:
    absent = dict.fromkeys(row("", 1), None) | {"contestant": "torch.compile", "reason": "failed: g++ <missing> & co"}

    def rows(taken: float) -> list[dict[str, Any]]:
        return [row("fastvae", taken), row("diffusers", 40), absent]

    blocks = [
        {"name": "encoder.conv_in", "path": "fused", "reason": None, "launches": 3, "bytes": 12_000_000},
        {"name": "encoder.mid_block", "path": "module", "reason": "HOOKS: a hook", "launches": 0, "bytes": 0},
    ]
    names = {"encode 2 x 256x256": 12.5, "decode 2 x 256x256": 31.25}
    return {
        "title": "fastvae bench",
        "model": {"source": "<script>alert(1)</script>", "parameters": 2_360_743},
        "device": "cuda:0",
        "dtype": "fp16",
        "cases": [
            {"name": name, "rounds": 20, "baseline": "diffusers", "rows": rows(taken)} for name, taken in names.items()
        ],
        "machine": {"gpu": 'A "card" of <none>', "gpu_memory_bytes": 80_000_000_000},
        "versions": {"torch": "2.13.0"},
        "explain": blocks,
        "notes": ["These numbers were not measured."],
    }
