"""Fixtures of the golden stores. Torch's own layers run, as on a user's CPU: the interpreter takes seconds a call."""

import json
import os
import shutil

import pytest
from data.conftest import _as_a_users_cpu as _as_a_users_cpu
from data.conftest import _small_check_pictures as _small_check_pictures
from golden.golden_store import DIGESTS, QUIET, STORES, Golden, lines_of

import fastvae


@pytest.fixture(params=sorted(DIGESTS))
def golden(request, tmp_path):
    """A copy of each store, and its images with the times in its plan, because git keeps no times."""
    made = STORES / request.param
    expected = json.loads((made / "expected.json").read_text("utf-8"))
    shutil.copytree(made / "source", tmp_path / "source")
    store = shutil.copytree(made / "store", tmp_path / "store")
    source = tmp_path / expected["source"]
    for line in [line for path in sorted((store / "plan").iterdir()) for line in lines_of(path)]:
        place = line["place"].rpartition("@")[0] or line["place"] or line["key"]
        os.utime((source if source.is_dir() else source.parent) / place, ns=(line["mtime_ns"], line["mtime_ns"]))
    return Golden(request.param, store, source, expected, {**expected["options"], **QUIET})


@pytest.fixture(scope="session")
def model():
    """The model of every store."""
    return fastvae.AutoencoderKL.from_pretrained("tiny").eval()
