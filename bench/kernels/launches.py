"""Every launch of fastvae_kernels, recorded on fake tensors and compiled by the imported Triton, without a GPU.

Each module of an op has ``audit_cases()``: an iterable of (label, call), where ``call()`` makes tensors by
torch.empty(..., device="cuda") and passes them to the module's launchers. Each call runs on fake tensors;
tiles.target_of returns the audited target, and Triton's launch is recorded, not run. So kernel, signature,
divisibility, constants, warps and stages are those of the launcher, and there is no second list.

bench/kernels/audit.py starts a process of this for each version of Triton:

    python -m bench.kernels.launches ROWS.json --triton 3.9.0 --target sm_90 --only residual
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.kernels.audit import AUDITED, COLUMNS
from bench.timing.environment import SOURCES

MATRIX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "mfma": r"v_mfma",
}


@dataclass
class Launch:
    """One recorded launch: the arguments of triton.compile, and the label of its case."""

    module: str
    kernel: str
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    options: dict[str, int]
    key: tuple = field(init=False)

    def __post_init__(self) -> None:
        parts = (self.signature, self.constants, self.options)
        self.key = (self.module, self.kernel, *(tuple(map(str, part.items())) for part in parts), *self.divisible)


def _value_type(value: Any) -> str:
    import torch

    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "uint8": "u8", "bool": "i1"}
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return "*" + names.get(name, name.replace("uint", "u").replace("int", "i"))
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def describe(kernel: Any, case: str, args: tuple, kwargs: dict) -> Launch:
    """Return what Triton would compile for this launch: types, constants, and arguments divisible by 16."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for param in kernel.params:
        value = named.get(param.name, param.default)
        special = not param.is_constexpr and not param.do_not_specialize
        whole = isinstance(value, int) and not isinstance(value, bool)
        if param.is_constexpr or value is None or (special and whole and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        signature[param.name] = _value_type(value)
        # torch aligns new tensors to 16 bytes or more.
        if special and (signature[param.name].startswith("*") or (whole and value % 16 == 0)):
            divisible.append(param.name)
    return Launch(kernel.fn.__module__, kernel.fn.__name__, case, signature, constants, divisible, options)


def record(target: Any, only: str = "") -> list[Launch]:
    """Return the distinct launches of every module's audit cases on this target (a tiles.Target)."""
    import torch
    from fastvae_kernels.shared import tiles
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import JITFunction

    launches: dict[tuple, Launch] = {}
    case = ""

    def take(kernel, *args, grid, warmup, **kwargs):
        launch = describe(kernel, case, args, kwargs)
        launches.setdefault(launch.key, launch)

    before = JITFunction.run, tiles.target_of
    JITFunction.run, tiles.target_of = take, lambda device: target  # type: ignore[method-assign]
    try:
        for path in sorted(SOURCES.glob("*.py")):
            if path.stem == "__init__" or only not in path.stem:
                continue
            module = importlib.import_module(f"fastvae_kernels.{path.stem}")
            for case, call in getattr(module, "audit_cases", list)():  # noqa: B007 (take reads it)
                with FakeTensorMode(), torch.device("cuda"):
                    call()
    finally:
        JITFunction.run, tiles.target_of = before
    return list(launches.values())


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return _number(r"REG:(\d+)", used.stdout), _number(r"STACK:(\d+)", used.stdout)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern}")
    return int(found[1])


def compile_launch(launch: Launch, architecture: str) -> dict[str, str]:
    """Compile one launch for one architecture and return its row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        launch.signature,
        {(position[name],): value for name, value in launch.constants.items()},
        {(position[name],): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    text = compiled.asm["amdgcn" if amd else "ptx"]
    if amd:
        registers, spilled = (_number(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
        spilled *= 4 * 64
        wide = [r"(global|buffer)_load_dwordx4", r"(global|buffer)_store_dwordx4"]
    else:
        registers, spilled = _cubin_resources(compiled.asm["cubin"])
        wide = [r"ld\.global\S*\.(v4\.b32|v2\.b64|v8)|cp\.async\.(cg|bulk)", r"st\.global\S*\.(v4\.b32|v2\.b64|v8)"]
    matrix = [name for name, pattern in MATRIX.items() if re.search(pattern, text)]
    constants = " ".join(f"{n}={v}" for n, v in launch.constants.items())
    values = (
        launch.kernel, launch.case, architecture, constants, launch.options.get("num_warps", 4),
        launch.options.get("num_stages", 3), registers, spilled, compiled.metadata.shared, " ".join(matrix) or "-",
        *(len(re.findall(pattern, text)) for pattern in wide), "sin.approx" in text or "v_sin_f32" in text,
        "tf32" in text or "xf32" in text,
    )  # fmt: skip
    return {"triton": triton.__version__} | {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


def _row(job: tuple[Launch, str]) -> dict[str, str]:
    try:
        return compile_launch(*job)
    except Exception as error:  # any failure of the compiler: the message names the kernel
        launch, architecture = job
        raise RuntimeError(f"{launch.kernel} ({launch.case}) does not compile for {architecture}: {error}") from error


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the JSON to write")
    parser.add_argument("--triton", default=triton.__version__, help="the version that must be the one imported")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--target", action="append", choices=AUDITED, help="only this target (may be repeated)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    arguments = parser.parse_args()
    if triton.__version__ != arguments.triton:
        parser.error(
            f"Triton {arguments.triton} is to compile, and {triton.__version__} is imported: "
            f"`make audit` installs it in build/triton-{arguments.triton}"
        )
    from fastvae_kernels.shared import tiles

    targets = arguments.target or AUDITED
    jobs = [(launch, name) for name in targets for launch in record(tiles.TARGETS[name], arguments.only)]
    if arguments.jobs == 1:
        rows = list(map(_row, jobs))
    else:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            rows = list(pool.map(_row, jobs, chunksize=4))
    arguments.rows.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
