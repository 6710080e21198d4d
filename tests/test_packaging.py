"""Checks that the package contains its files, and that the installed wheel works outside the repository."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".json", ".jinja", ".md", ".safetensors"}


def test_the_package_has_every_file_of_the_repository(monkeypatch):
    """The list of files that setuptools builds, without a build: every module and every asset is in it."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    distribution.include_package_data = False  # only the patterns of pyproject.toml count, not a version control plugin
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    outputs = command.get_outputs(include_bytecode=False)
    packaged = {Path(output).relative_to(command.build_lib).as_posix() for output in outputs}
    roots = {"fastvae": ROOT, "fastvae_kernels": ROOT / "kernels"}
    files = {
        path.relative_to(root).as_posix()
        for package, root in roots.items()
        for path in (root / package).rglob("*")
        if path.suffix in SUFFIXES
    }
    assert {"fastvae/assets/tiny/diffusion_pytorch_model.safetensors", "fastvae/report/comparison.html.jinja"} <= files
    assert packaged == files


def run(*command, cwd):
    # Neither paths nor settings of this checkout reach the command.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "TRITON_"))}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastvae_latents-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastvae", "fastvae_kernels", next(t for t in tops if t.endswith(".dist-info"))}
    assert "fastvae/assets/tiny/diffusion_pytorch_model.safetensors" in names
    assert {"fastvae/assets/buckets/sdxl.json", "fastvae/report/comparison.html.jinja"} <= set(names)

    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run(*pip, "torch==2.13.0", cwd=tmp_path)
    run(*pip, f"{wheel}[demo]", cwd=tmp_path)
    printed = run(python.parent / "fastvae", "demo", tmp_path / "out", cwd=tmp_path)
    assert "mean" in printed
    assert (tmp_path / "out" / "originals-and-reconstructions.png").exists()
    where = run(python, "-c", "import fastvae; print(fastvae.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where
