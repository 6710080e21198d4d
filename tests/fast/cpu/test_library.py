"""The library of C kernels: the reasons why there is none, and the path without it."""

import ctypes
from pathlib import Path

import pytest
import torch
from fast.small_models import pixels, small_model
from fastvae_kernels.cpu import library, sources

import fastvae


@pytest.fixture
def _none_built(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    found = library.Library()
    monkeypatch.setattr("fastvae_kernels.cpu.group_norm.library", lambda: found)
    monkeypatch.setattr("fastvae_kernels.cpu.winograd.library", lambda: found)
    monkeypatch.setattr(library, "library", lambda: found)


@pytest.mark.usefixtures("users_cpu", "_none_built")
def test_without_the_library_torchs_operators_run_and_the_report_says_so():
    vae = fastvae.accelerate(small_model("SD"), freeze=True)
    plain = fastvae.restore(small_model("SD")).encode(pixels(vae)).latent_dist.parameters
    assert torch.allclose(vae.encode(pixels(vae)).latent_dist.parameters, plain, atol=1e-4)
    assert fastvae.fast_report(vae)["cpu_kernels"] == library.NOT_BUILT


@pytest.mark.skipif(
    not hasattr(library.library().functions, "fastvae_norm_avx512"), reason="no functions for AVX512 are built"
)
def test_vectors_of_avx512_run_where_the_cpu_and_the_channels_allow_them(monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    for capability, suffix in (("AVX512", "_avx512"), ("AVX2", "")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        found = library.Library()
        assert [found.function("norm", channels).__name__ for channels in (24, 32)] == [
            "fastvae_norm",
            f"fastvae_norm{suffix}",
        ]
        monkeypatch.setattr(library, "library", lambda found=found: found)
        assert library.build_name() == f"built for {capability}"


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
def test_a_library_without_functions_for_avx512_runs_those_for_avx2(monkeypatch):
    """As Clang builds it."""

    load = ctypes.CDLL

    class WithoutAvx512:
        def __init__(self, path):
            self.functions = load(path)

        def __getattr__(self, name):
            if name.endswith("_avx512"):
                raise AttributeError(name)
            return getattr(self.functions, name)

    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(library.ctypes, "CDLL", WithoutAvx512)
    found = library.Library()
    assert (found.why_not, found.has_avx512) == (None, False)
    assert found.function("norm", 32).__name__ == "fastvae_norm"


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
def test_new_memory_is_in_large_pages():
    """``hg`` is the flag of a mapping for which they were asked."""
    memory = library.empty(2**22, torch.float32)
    assert (memory.shape, memory.dtype) == ((2**22,), torch.float32)
    middle, flags = memory.data_ptr() + 2**23, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
        elif line.startswith("VmFlags") and first <= middle < last:
            flags = line
    assert " hg" in flags


def test_memory_without_the_library_is_torchs(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    found = library.Library()
    monkeypatch.setattr(library, "library", lambda: found)
    assert library.empty(3, torch.bfloat16).shape == (3,)


def test_a_library_of_other_sources_is_refused(monkeypatch):
    if library.why_not() is not None:
        pytest.skip(str(library.why_not()))
    monkeypatch.setattr(sources, "source_hash", lambda: "another")
    refused = library.Library()
    assert (refused.functions, refused.why_not) == (None, library.OTHER_SOURCES)


def test_a_change_of_a_flag_is_other_sources(monkeypatch):
    before = sources.source_hash()
    monkeypatch.setattr(sources, "FLAGS", ("-O2", *sources.FLAGS[1:]))
    assert sources.source_hash() != before


@pytest.mark.usefixtures("_none_built")
def test_another_system_than_linux_has_its_reason(monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(library.platform, "system", lambda: "Darwin")
    assert library.Library().why_not == library.NOT_LINUX


def test_an_x86_cpu_without_avx2_has_its_reason(monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert library.Library().why_not == library.NO_AVX2


@pytest.mark.parametrize("file", ["no library", "a library without the functions"])
def test_a_library_that_does_not_load_has_its_reason(file, monkeypatch, tmp_path):
    built = tmp_path / "built" / "kernels.abi3.so"
    built.parent.mkdir()
    if file == "no library":
        built.write_bytes(b"")
    else:
        built.symlink_to(torch._C.__file__)
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    refused = library.Library()
    assert refused.functions is None
    assert str(refused.why_not).startswith("the C kernels cannot be loaded: ")
