"""Findings of fastvae doctor: one sentence each, with the state and the remedy."""

import errno
import importlib.metadata
import itertools
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from fastvae_kernels import group_norm_silu
from fastvae_kernels.cpu.library import build_name, why_not
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from support.small_store import small_vae

import fastvae
from fastvae.fast.forms import tables
from fastvae.fast.forms.form import Entry, Form
from fastvae.report import doctor, torch_checks
from fastvae.report.correctness import Truth
from fastvae.report.doctor import check_disk, check_distribution, check_gpu, check_versions, examine

FINE = {"fastvae": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "triton": "3.9.0"}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({}, "ok", "fastvae 0.1.0, python 3.11.7, torch 2.13.0+cpu, triton 3.9.0"),
        ({"torch": "2.11.0"}, "ok", ""),
        ({"torch": "3.0.0a0+git"}, "ok", ""),
        ({"torch": "2.9.1"}, "bad", 'torch 2.9.1 is too old: pip install "torch>=2.11", for fastvae needs 2.11 or n'),
        ({"triton": "3.5.1"}, "bad", 'triton 3.5.1 is too old: pip install "triton>=3.6"'),
        ({"diffusers": "0.30.0"}, "bad", 'diffusers 0.30.0 is too old: pip install "diffusers>=0.38"'),
        ({"python": "3.10.2"}, "bad", "python 3.10.2 is too old: install 3.11 or newer"),
        ({"torch": None}, "bad", "torch is not installed: pip install torch"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_versions(changes, state, words):
    found = {name: version for name, version in {**FINE, **changes}.items() if version is not None}
    finding = check_versions(found)
    assert finding.state == state
    assert finding.sentence.startswith(words)
    assert finding.facts == found


def test_triton_is_missed_on_linux_alone(monkeypatch):
    found = {name: version for name, version in FINE.items() if name != "triton"}
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    assert check_versions(found).sentence.startswith("triton is not installed: pip install triton")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    assert check_versions(found).state == "ok"


Card = namedtuple("Card", "name total_memory major minor")


def torch_with(*cards, cuda: str | None = "12.8"):
    return types.SimpleNamespace(
        __version__="2.13.0",
        version=types.SimpleNamespace(cuda=cuda, hip=None),
        cuda=types.SimpleNamespace(
            is_available=lambda: bool(cards),
            device_count=lambda: len(cards),
            get_device_properties=lambda index: cards[index],
        ),
    )


@pytest.mark.parametrize(
    ("fake", "driver", "state", "words"),
    [
        (torch_with(Card("H", 80e9, 9, 0)), "570.1", "ok", "H (74.5 GiB, sm_90), driver 570.1, torch built for 12.8"),
        (torch_with(Card("H", 80e9, 9, 0), Card("T", 16e9, 7, 5)), "570.1", "note", "sm_80 and newer"),
        (torch_with(cuda=None), "570.1", "bad", "torch 2.13.0 is a CPU build: install one with CUDA from pytorch.org"),
        (torch_with(), "570.1", "bad", "torch (CUDA 12.8) cannot use it: update the driver, or correct CUDA_VISIBLE_D"),
        (torch_with(), None, "note", "no GPU was found, so everything runs on the CPU"),
    ],
    ids=["a card", "an old one too", "a CPU build", "an old driver", "no card"],
)
def test_gpu(fake, driver, state, words, monkeypatch):
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    finding = check_gpu(fake)
    assert finding.state == state
    assert words in finding.sentence


def test_disk_is_timed_in_the_nearest_folder_that_is_there_and_nothing_stays(tmp_path):
    finding = check_disk(tmp_path / "not" / "yet", repeats=2)
    assert finding.facts["folder"] == str(tmp_path)
    assert len(finding.facts["fsync_seconds"]) == 2
    assert f"1 MiB is written to {tmp_path} in " in finding.sentence
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_bad(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    finding = check_disk(tmp_path / "file" / "latents")
    assert (finding.state, finding.sentence) == (
        "bad",
        f"{tmp_path / 'file'} cannot be written (Not a directory): choose another folder for latents",
    )

    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot be written (Read-only file system)" in check_disk(tmp_path).sentence


def test_a_slow_disk_and_a_full_one_are_notes(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(1, 1, 10**8))
    assert "95.4 MiB are free: a million latents of 256x256 need 15.3 GiB" in check_disk(tmp_path).sentence
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(1, 1, 10**12))
    monkeypatch.setattr(doctor.time, "perf_counter", itertools.count().__next__)
    finding = check_disk(tmp_path)
    assert (finding.state, finding.sentence.partition(": ")[2]) == ("note", "that is slow; use a local disk")


def test_kernels_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch_checks, "INTERPRETED", False)
    finding = torch_checks.check_kernels(CPU)
    assert finding.state == "note"
    assert "its kernels need a GPU: a CPU takes the path cpu, " in finding.sentence
    assert finding.sentence.endswith(
        f"with C kernels {build_name()}" if why_not() is None else f"without C kernels: {why_not()}"
    )
    assert finding.facts["cpu_kernels"] == build_name()
    monkeypatch.setattr(torch_checks, "HAS_TRITON", False)
    assert torch_checks.check_kernels(CPU).state == "note"
    missing = torch_checks.check_kernels(torch.device("cuda"))
    assert missing.state == "bad"
    assert "pip install triton" in missing.sentence


def test_the_interpreter_is_bad_on_a_gpu_and_ignored_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch_checks, "INTERPRETED", True)
    for device, state in (("cpu", "note"), ("cuda", "bad")):
        finding = torch_checks.check_kernels(torch.device(device))
        assert finding.state == state
        assert "TRITON_INTERPRET=1 is for debugging kernels: unset it" in finding.sentence


@pytest.mark.skipif("cpu" not in KERNEL_DEVICES, reason="no kernel runs on the CPU")
def test_a_kernel_is_run_and_compared(monkeypatch):
    assert torch_checks.check_launch(CPU, {}).state == "ok"
    monkeypatch.setattr(group_norm_silu, "group_norm_silu", lambda x, *rest: x + 1)
    finding = torch_checks.check_launch(CPU, {})
    assert finding.state == "bad"
    assert "a kernel ran, and its result is wrong by " in finding.sentence

    def fail(*arguments):
        raise subprocess.CalledProcessError(1, ["gcc"])

    monkeypatch.setattr(group_norm_silu, "group_norm_silu", fail)
    finding = torch_checks.check_launch(CPU, {})
    assert finding.state == "bad"
    assert finding.sentence.startswith("a kernel could not be compiled or launched: Command '['gcc']'")


def numbers(model):
    return torch_checks.check_numbers("small", model, CPU)


@pytest.mark.usefixtures("as_a_users_cpu")
def test_numbers_are_those_of_the_model_that_is_given(monkeypatch):
    finding = numbers(small_vae())
    assert finding.state == "ok"
    assert finding.sentence.startswith("small in ")
    for task in ("encode", "decode"):
        assert 0 < finding.facts[task]["error"] <= finding.facts[task]["allowed_error"]
    broken = small_vae()
    broken.decoder.conv_out.weight.data[:] = torch.nan
    finding = numbers(broken)
    assert finding.state == "bad"
    assert "small: an image was decoded wrong" in finding.sentence
    monkeypatch.setattr(torch_checks, "truth_of", lambda *arguments: Truth([0], torch.full((8, 8, 8), 9.0), 1.0, 1.0))
    finding = numbers(small_vae())
    assert finding.state == "bad"
    assert finding.sentence.startswith("small: an image was encoded wrong")
    assert finding.sentence.endswith("use another version of torch or Triton")


@pytest.mark.usefixtures("as_a_users_cpu")
def test_an_error_of_the_model_is_a_finding(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(torch_checks, "truth_of", fail)
    finding = numbers(small_vae())
    assert (finding.state, finding.sentence) == (
        "bad",
        "small could not encode and decode an image: Failed to find C compiler.",
    )


@pytest.mark.usefixtures("as_a_users_cpu")
def test_the_examination_is_of_the_model_that_is_given(small_model, monkeypatch):
    """A model on disk: its load, its structure, its numbers and its paths; what cannot be loaded has one finding."""
    monkeypatch.setattr(torch_checks, "check_images", lambda: check_disk(Path()))
    found = {finding.name: finding for finding in examine(small_model)}
    assert found["model"].facts["parameters"] == sum(parameter.numel() for parameter in small_vae().parameters())
    assert found["model"].sentence.startswith(f"{small_model}: AutoencoderKL, ")
    assert found["numbers"].sentence.startswith(f"{small_model} in ")
    assert found["paths"].sentence.startswith(f"{small_model} on cpu in ")
    names = [finding.name for finding in examine(str(Path(small_model) / "not"))]
    assert names[3:5] == ["kernels", "model"]
    assert "numbers" not in names


def block(name, reason=None):
    return {"name": name, "path": "module" if reason else "fused", "reason": reason, "launches": 0, "bytes": 0}


@pytest.mark.parametrize(
    ("rows", "state", "words"),
    [
        ([block("a"), block("b")], "ok", "it: all 2 blocks are fused"),
        ([block("a", "H: hook")], "note", "it: no block is fused (hook)"),
        ([{**block("a", "CPU: no kernel"), "path": "cpu"}], "note", "it: every block takes the path cpu (no kernel)"),
        ([block("a"), block("b", "H: hook")], "note", "it: 1 of 2 blocks are fused; not fused: b (hook)"),
        (
            [block("a"), *(block(name, f"X{i % 2}: why {i % 2}") for i, name in enumerate("bcdef"))],
            "note",
            "it: 1 of 6 blocks are fused; not fused: b, c, d and 2 more (why 0; why 1)",
        ),
    ],
)  # fmt: skip
def test_paths(rows, state, words):
    finding = torch_checks.judge_paths("it", rows)
    assert (finding.state, finding.sentence) == (state, words)


def test_a_model_that_is_not_there_is_bad(tmp_path):
    finding, model = torch_checks.check_model(str(tmp_path), None, None, None)
    assert (finding.state, model) == ("bad", None)
    assert finding.sentence.startswith(f"the model {tmp_path} cannot be used: ")


def test_a_device_without_a_table_of_forms_is_told_to_tune(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tables, "_forms_of", tables._forms_of.__wrapped__)  # not kept from test to test
    name = tables.name_of(CPU)
    finding = torch_checks.check_forms(CPU)
    assert finding.state == "note"
    assert f"is fastest on {name}: fastvae tune --vae" in finding.sentence
    entries = [Entry("conv", 8, 8, "float32", pixels, form) for pixels, form in enumerate(Form)]
    monkeypatch.setattr(tables, "clear", lambda: None)
    path = tables.write(name, entries, {})
    finding = torch_checks.check_forms(CPU)
    assert (finding.state, finding.facts["entries"], finding.facts["own"]) == ("ok", len(Form), True)
    assert f"a faster form for {len(Form) - 1} of its {len(Form)} entries" in finding.sentence
    monkeypatch.setenv("FASTVAE_CACHE", str(path))
    finding = torch_checks.check_forms(CPU)
    assert finding.state == "note"
    assert "; your own table cannot be read: " in finding.sentence
    assert f"Not a directory: '{path}" in finding.sentence
    monkeypatch.setenv("FASTVAE_CACHE", str(tmp_path))
    path.write_text("{")
    finding = torch_checks.check_forms(CPU)
    assert finding.state == "bad"
    assert f"{path} is not a table of forms" in finding.sentence


def test_images_are_read_by_the_clock(monkeypatch):
    finding = torch_checks.check_images(0.05)
    assert finding.facts["images_per_second"] > 0
    assert 20_000 < finding.facts["bytes"] < 300_000  # the size of such a photograph
    monkeypatch.setattr("PIL.features.version_feature", lambda name: None)
    finding = torch_checks.check_images(0.01)
    assert finding.state == "note"
    assert "without libjpeg-turbo: the Pillow of PyPI has it" in finding.sentence


def test_a_torch_that_cannot_be_loaded_ends_the_examination(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = list(examine())
    assert [finding.name for finding in findings] == ["versions", "install", "torch"]
    assert findings[-1].state == "bad"
    assert findings[-1].sentence.startswith("torch cannot be imported, so nothing else was checked: ")


def test_the_distribution_is_named_with_its_place(monkeypatch):
    def version(name):
        if name != "fastvae-latents":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = check_distribution()
    assert finding.state == "ok"
    assert finding.sentence == f"fastvae-latents 0.1.0, imported from {Path(fastvae.__file__).parent}"


def test_another_distribution_under_the_same_import_name_is_a_note(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    finding = check_distribution()
    assert (finding.state, "fastvae-latents is not installed" in finding.sentence) == ("note", True)


def test_a_distribution_of_other_authors_under_the_same_name_is_bad(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"fastvae": "9.9", "fastvae-latents": "0.1.0"}.__getitem__)
    finding = check_distribution()
    assert (finding.state, finding.facts["other"]) == ("bad", "fastvae 9.9")
    assert "fastvae 9.9 of other authors is installed under the same import name" in finding.sentence
    assert "pip uninstall fastvae, and install fastvae-latents again" in finding.sentence
