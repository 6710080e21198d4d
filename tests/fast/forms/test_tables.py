"""Tables of forms: which entry a layer takes, which file it comes from, and what a broken file says."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from fastvae.fast.forms import device_name, tables
from fastvae.fast.forms.form import DIRECT_ONLY, Entry, Form, Forms

CPU = torch.device("cpu")
WEIGHT = torch.empty(512, 256, 3, 3)


def entry(form: Form, pixels: int = 1024, outputs: int = 512, kind: str = "conv") -> Entry:
    return Entry(kind, 256, outputs, "float32", pixels, form)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTVAE_CACHE")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.clear()
    yield tmp_path
    tables.clear()


def write(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"entries": [vars(line) for line in entries]}))
    tables.clear()


def test_without_an_entry_the_direct_form_runs():
    assert tables.forms_of(CPU).of(WEIGHT, 4096) is Form.DIRECT
    assert not tables.forms_of(CPU).digest
    assert not tables.has_table(CPU)


def test_an_entry_holds_from_its_pixels_to_those_of_the_next():
    forms = Forms([entry(Form.DIRECT, 16384), entry(Form.WINOGRAD2, 1024), entry(Form.WINOGRAD4, 4096)])
    found = [forms.of(WEIGHT, pixels) for pixels in (1023, 1024, 4095, 4096, 16383, 16384, 10**6)]
    assert [form.value for form in found] == ["direct", *["winograd2"] * 2, *["winograd4"] * 2, *["direct"] * 2]


@pytest.mark.parametrize(
    "other", [WEIGHT.bfloat16(), WEIGHT[:128], WEIGHT[:, :128]], ids=["dtype", "outputs", "inputs"]
)
def test_an_entry_is_of_one_layer_and_one_dtype(other):
    assert Forms([entry(Form.WINOGRAD4)]).of(other, 4096) is Form.DIRECT


def test_an_upsampling_convolution_has_entries_of_its_own():
    forms = Forms([entry(Form.WINOGRAD4, kind="upsample")])
    assert (forms.of(WEIGHT, 4096), forms.of(WEIGHT, 4096, "upsample")) == (Form.DIRECT, Form.WINOGRAD4)


def test_the_users_table_replaces_the_shipped_one_layer_by_layer(folders):
    name = device_name.name_of(CPU)
    write(folders / "shipped" / f"{name}.json", entry(Form.WINOGRAD4), entry(Form.WINOGRAD4, outputs=128))
    write(tables.users_table(name), entry(Form.WINOGRAD2, 4096))
    forms = tables.forms_of(CPU)
    # Of a layer that the user measured, no shipped entry is left, also none for other sizes.
    assert [forms.of(WEIGHT, pixels) for pixels in (1024, 4096)] == [Form.DIRECT, Form.WINOGRAD2]
    assert forms.of(WEIGHT[:128], 1024) is Form.WINOGRAD4
    assert tables.users_table(name) == folders / "cache" / "fastvae" / "forms" / f"{name}.json"


def test_the_digest_is_that_of_the_entries_in_any_order():
    two = [entry(Form.WINOGRAD2), entry(Form.WINOGRAD4, 4096)]
    assert Forms(two).digest == Forms(two[::-1]).digest != Forms(two[:1]).digest


LINE = vars(entry(Form.DIRECT))
BROKEN = {
    "no JSON": "{",
    "no table": "[]",
    "lines missing": '{"entries": [{"kind": "conv"}]}',
    "no entry": '{"entries": [3]}',
    "unknown form": json.dumps({"entries": [{**LINE, "form": "fft"}]}),
    "text for a number": json.dumps({"entries": [{**LINE, "pixels": "1024"}]}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_named(text):
    path = tables.users_table(device_name.name_of(CPU))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cpu-.*json is not a table of forms .*fastvae tune"):
        tables.forms_of(CPU)


def without_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "home", home)
    return "FASTVAE_CACHE must name a folder, for this user has no home folder"


def behind_a_file(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    return "Not a directory"


def not_permitted(monkeypatch):
    def read_text(path, **options):
        if path.parent == tables.SHIPPED:
            return plain(path, **options)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    plain = Path.read_text
    monkeypatch.setattr(Path, "read_text", read_text)
    return "Permission denied"


@pytest.mark.parametrize("fault", [without_home, behind_a_file, not_permitted])
def test_a_cache_folder_that_cannot_be_read_is_no_table_of_the_user(folders, monkeypatch, fault):
    name = device_name.name_of(CPU)
    write(folders / "shipped" / f"{name}.json", entry(Form.WINOGRAD4))
    reason = fault(monkeypatch)
    assert tables.forms_of(CPU).of(WEIGHT, 1024) is Form.WINOGRAD4
    assert tables.has_table(CPU)
    entries, why_not = tables.users_entries(name)
    assert not entries
    assert reason in why_not
    with pytest.raises(OSError, match=reason):
        tables.write(name, [entry(Form.DIRECT)], {})


@pytest.mark.parametrize(
    ("capability", "amx", "name"),
    [
        ("AVX2", False, "avx2"),
        ("AVX512", False, "avx512"),
        ("AVX512", True, "amx"),
        ("AVX2", True, "avx2"),  # ATEN_CPU_CAPABILITY=avx2 on a newer CPU
        ("DEFAULT", False, "default"),
    ],
)
def test_a_cpu_has_the_name_of_its_class(monkeypatch, capability, amx, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert device_name.name_of(CPU) == f"cpu-x86-64-{name}"


def test_on_a_gpu_only_frozen_weights_take_the_tables_forms(tiny_path, monkeypatch):
    """There a transformed weight takes longer to make than it saves in one call; on a CPU's path it does not."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ("cpu",))
    write(tables.users_table(device_name.name_of(CPU)), entry(Form.WINOGRAD4))
    assert tiny_path(freeze=True).forms_on(CPU).digest
    assert tiny_path(freeze=False).forms_on(CPU) is DIRECT_ONLY
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    assert tiny_path(freeze=False).forms_on(CPU).digest


@pytest.fixture
def tiny_path():
    from fastvae.fast.fast_path import FastPath

    return lambda freeze: FastPath(deterministic=False, graphs=False, freeze=freeze)
