"""Source files that could not be read or were too large, and runs that try them again."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from support.small_store import SIDE, picture, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.sources.folder import list_folder

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def means(store) -> dict[str, np.ndarray]:
    """Return the mean of each key."""
    return {item["key"]: item["mean"].clone().numpy() for item in LatentDataset(store)}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


def test_an_unreadable_file_is_tried_again(source, tmp_path, monkeypatch):
    out, real = tmp_path / "out", Path.open
    locked_file = source / "001.png"

    def denied(path, *arguments, **named):
        if path == locked_file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        assert encode(source, out, vae=small_vae(), **OPTIONS).reasons == {"unreadable": 1}
    report = encode(source, out, vae=small_vae(), **OPTIONS)
    assert (report.ok, report.resumed, report.failed_before, report.reasons) == (1, 1, 0, {})
    assert sorted(means(out)) == ["000.png", "001.png"]
    assert encode(source, out, vae=small_vae(), **OPTIONS).resumed == 2
    assert len(list(out.glob("plan/*"))) == 2


def test_a_file_that_was_too_large_is_tried_again_under_a_higher_limit(source, tmp_path):
    out = tmp_path / "out"
    picture(9, 100, 80).save(source / "large.png")
    options = {"vae": small_vae(), **OPTIONS}
    assert encode(source, out, max_pixels=5000, **options).reasons == {"too_large": 1}
    assert encode(source, out, max_pixels=5000, **options).failed_before == 1
    assert encode(source, out, max_pixels=6000, **options).failed == 1
    assert encode(source, out, max_pixels=8000, **options).ok == 1
    assert sorted(means(out)) == ["000.png", "001.png", "large.png"]


def test_row_12_unreadable_folders_are_skipped_and_named(source, tmp_path, monkeypatch):
    os.symlink("loop", source / "loop")
    (source / "closed").mkdir()
    real = os.scandir

    def scandir(folder):
        if os.path.basename(folder) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = list_folder(source)
    assert [file.key for file in listing.files] == ["000.png", "001.png"]
    assert listing.ignored == 2
    assert sorted(listing.unreadable) == ["closed", "loop"]
    report = encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert "ignored 2 others, among them what cannot be looked into: " in "\n".join(report.lines())
