"""The report of a run: its JSON, and its lines on a stderr that is full, closed or missing."""

import errno
import json
import os
import sys

import pytest
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.report import EncodeReport
from fastvae.fast.accelerate import accelerate
from fastvae.fast.forms import tables
from fastvae.fast.forms.form import Entry, Form, Forms
from fastvae.system.strict_json import strict_json

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


class Full:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")

    encoding = "utf-8"


@pytest.mark.parametrize("stderr", [None, "full", "closed"])
def test_a_run_continues_without_stderr(source, tmp_path, monkeypatch, stderr):
    closed = open(os.devnull, "w")  # noqa: SIM115 (closed is the point)
    closed.close()
    monkeypatch.setattr(sys, "stderr", {None: None, "full": Full(), "closed": closed}[stderr])
    assert encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS | {"progress": True}).ok == 2


def test_the_report_names_the_table_of_forms(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_forms_of", lambda name: Forms())
    assert encode(source, tmp_path / "without", vae=small_vae(), **OPTIONS).forms == ""
    forms = Forms([Entry("conv", 512, 512, "float32", 1024, Form.DIRECT)])
    monkeypatch.setattr(tables, "_forms_of", lambda name: forms)
    report = encode(source, tmp_path / "with", vae=small_vae(), **OPTIONS)
    assert report.forms == json.loads(report.to_json())["forms"] == forms.digest
    assert f"forms   of convolutions by the table {forms.digest}" in report.lines()
    exact = accelerate(small_vae(), precision="exact")
    assert encode(source, tmp_path / "exact", vae=exact, **OPTIONS).forms == ""


def test_json_has_null_for_nan_and_infinity():
    report = EncodeReport("out", "id", "bf16", float("nan"))
    assert json.loads(report.to_json(), parse_constant=pytest.fail)["dtype_error"] is None
    assert strict_json({"psnr": {"a": float("inf"), "b": 3.5}, "of": (float("-inf"),)}) == (
        '{"psnr": {"a": null, "b": 3.5}, "of": [null]}'
    )
