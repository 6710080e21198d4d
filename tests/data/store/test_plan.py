"""Plan files: written once, and refused when damaged."""

import errno

import pytest
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.store.errors import StoreError
from fastvae.system.atomic_files import write_atomically

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


def test_a_plan_file_is_never_replaced(tmp_path, monkeypatch):
    path = tmp_path / "units-00000.jsonl"
    write_atomically(path, [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, [b"second"], exclusive=True)

    def unsupported(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("fastvae.system.atomic_files.os.link", unsupported)
    with pytest.raises(FileExistsError):
        write_atomically(path, [b"second"], exclusive=True)
    assert path.read_bytes() == b"first"
    write_atomically(tmp_path / "other", [b"x"], exclusive=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", path.name]


@pytest.mark.parametrize("line", ["[]", "3", '{"unit": 0, "key": 1, "size": 2, "mtime_ns": 3}', "null"])
def test_a_line_that_is_no_row_is_a_store_error(source, tmp_path, line):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    (out / "plan" / "units-00000.jsonl").write_text(line + "\n")
    with pytest.raises(StoreError, match=r"units-00000\.jsonl is damaged"):
        encode(source, out, vae=small_vae(), **OPTIONS)
