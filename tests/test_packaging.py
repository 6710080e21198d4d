"""Checks that the package contains its files, and that the installed wheel works outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".json", ".jinja", ".md", ".safetensors", ".c", ".h"}


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


def test_an_editable_install_is_found_in_the_folder_above_the_checkout(tmp_path):
    """There the folder ``fastvae``, which is the checkout, is an empty namespace package of the same name."""
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    checkout, installed = tmp_path / "fastvae", tmp_path / "site-packages"
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "build_backend.py"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, checkout / file)
    for package in ("fastvae", "kernels/fastvae_kernels"):
        (checkout / package).mkdir(parents=True, exist_ok=True)
        (checkout / package / "__init__.py").write_text(f"place = {package!r}\n")
    build = "import build_backend as backend; print(backend.build_sdist('..'), backend.build_editable('..'))"
    source, name = run(sys.executable, "-c", build, cwd=checkout).split()[-2:]
    with tarfile.open(tmp_path / source) as archive:
        assert "build_backend.py" in {Path(member).name for member in archive.getnames()}
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(installed)
        record = wheel.read(next(member for member in wheel.namelist() if member.endswith("RECORD"))).decode()
    assert {line.split(",")[0] for line in record.splitlines()} == {*wheel.namelist()}
    found = "import site; site.addsitedir('site-packages'); import fastvae, fastvae_kernels"
    printed = run(sys.executable, "-S", "-c", f"{found}; print(fastvae.place, fastvae_kernels.place)", cwd=tmp_path)
    assert printed.split() == ["fastvae", "kernels/fastvae_kernels"]


@pytest.fixture
def checkout(tmp_path):
    """Folder with the Makefile, where a script that prints "step" takes the place of Python and pip."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    built_from = "setup.py", "build_backend.py", "kernels/fastvae_kernels/cpu/sources.py"
    for file in ("Makefile", "pyproject.toml", "constraints.txt", *built_from):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    stub = tmp_path / "python"
    files = f"mkdir -p .venv/bin\ncp {stub} .venv/bin/python\ncp {stub} .venv/bin/fastvae\n"
    stub.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit $OLD; fi\n{files}echo step\nexit $BROKEN\n')
    stub.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(("target", "steps"), [("demo", 4), ("test", 5)])
def test_make_prints_one_line_a_step(checkout, target, steps):
    """pip works for minutes without a word."""
    command = ("make", "--no-print-directory", target, "PYTHON=./python")  # make above this run would turn it on
    lines = run(*command, cwd=checkout).splitlines()
    assert [line == "step" for line in lines] == [False, True] * steps, lines
    assert lines[2] == "Installing torch (some minutes)"
    assert len(run(*command, cwd=checkout).splitlines()) == 2  # everything is installed


@pytest.mark.parametrize("fault", ["OLD", "BROKEN"])
def test_make_stops_before_it_installs_into_a_python_that_cannot_hold_fastvae(checkout, monkeypatch, fault):
    monkeypatch.setenv(fault, "1")
    done = subprocess.run(
        ["make", "demo", "PYTHON=./python"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Installing" not in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastvae_latents-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastvae", "fastvae_kernels", next(t for t in tops if t.endswith(".dist-info"))}
    assert "fastvae/assets/tiny/diffusion_pytorch_model.safetensors" in names
    assert any(name.startswith("fastvae_kernels/cpu/built/kernels") for name in names) == bool(shutil.which("gcc"))
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
