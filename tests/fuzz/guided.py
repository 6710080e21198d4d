"""Coverage-guided fuzzing of one parser by atheris: python guided.py TARGET [libFuzzer's own options].

A finding is written to the current folder and ends the run with an exit code other than 0.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]

import atheris  # noqa: E402

# Libraries first, so that only the package is instrumented.
import PIL.Image  # noqa: E402, F401
import safetensors.torch  # noqa: E402, F401
import torch  # noqa: E402, F401

with atheris.instrument_imports(include=["fastvae"]):
    from fuzz.parsers import TARGETS


def main() -> None:
    """Fuzz the target of the command line."""
    name, *options = sys.argv[1:]
    target, seeds = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fastvae-corpus-{name}-"))
    for number, seed in enumerate(seeds):
        (folder / f"{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(folder), *options], target)
    atheris.Fuzz()


main()
