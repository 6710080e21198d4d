"""Captions beside images: text files, metadata of an imagefolder, and what cannot be used."""

import io
import json
import sys
import tarfile

import pytest
from data.sources.numbered_images import png
from support.small_store import small_vae

from fastvae.data.encoding.encode import encode
from fastvae.data.sources.open import open_source
from fastvae.data.store.store import Store


def write(root, **contents):
    """Write images, for a number, and other files, for text or bytes; "/" is "__" and "." is "_" in a name."""
    for name, content in contents.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = png(content) if isinstance(content, int) else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def columns_of(src, **options):
    listing = open_source(src, **options).listing()
    return {file.key: dict(file.columns) for file in listing.files}, listing


def jsonl(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_text_files_beside_images_are_columns(tmp_path):
    write(
        tmp_path,
        a_png=0,
        a_txt="a cat\n",
        b_c_jpg=1,
        b_c_caption="\ufeffein H\u00fcndchen ",
        sub__d_png=2,
        d_txt="of no image",
    )
    write(tmp_path, sub__d_txt="a dog", sub__readme_txt="x", e_png=3)
    expected = {
        "a.png": {"txt": "a cat"},
        "b.c.jpg": {"caption": "ein H\u00fcndchen"},
        "e.png": {},
        "sub/d.png": {"txt": "a dog"},
    }
    found, listing = columns_of(tmp_path)
    assert (found, listing.ignored, listing.notes) == (expected, 5, [])
    assert columns_of(f"{tmp_path}/**/*.{{png,jpg}}")[0] == expected
    assert columns_of(f"{tmp_path}/*.png")[0] == {"a.png": {"txt": "a cat"}, "e.png": {}}
    found, listing = columns_of(tmp_path, captions="none")
    assert (found, listing.ignored) == ({key: {} for key in expected}, 5)
    with pytest.raises(ValueError, match="captions must be"):
        open_source(tmp_path, captions="all")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_captions_in_utf_16_are_text(tmp_path, encoding):
    """As Notepad and PowerShell write it, with a byte order mark."""
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""  # Python writes that of "utf-16" itself
    caption, metadata = ("Hündchen", "file_name,text\nb.png,Kätzchen\n")
    write(tmp_path, a_png=0, a_txt=mark + caption.encode(encoding), b_png=1)
    (tmp_path / "metadata.csv").write_bytes(mark + metadata.encode(encoding))
    assert columns_of(tmp_path)[0] == {"a.png": {"txt": caption}, "b.png": {"text": "Kätzchen"}}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
        archive.add(tmp_path / "a.txt", "a.txt")
    assert columns_of(tmp_path / "a.tar")[0] == {"a": {"txt": caption}}


def test_captions_in_latin_1_are_counted(tmp_path):
    write(tmp_path / "in", a_png=0, a_txt="caf\u00e9".encode("latin-1"), b_png=1, b_txt="caf\u00e9", c_png=2)
    (tmp_path / "in" / "metadata.csv").write_bytes(b"file_name,text\nc.png,caf\xe9\n")
    options = {"vae": small_vae(), "buckets": 16, "dtype": "fp32", "device": "cpu", "progress": False}
    report = encode(tmp_path / "in", tmp_path / "out", **options)
    assert json.loads(report.to_json())["captions_not_utf8"] == 2
    assert "caption 2 images have one that is no UTF-8, stored as its bytes" in report.lines()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            archive.add(tmp_path / "in" / name, name)
    assert columns_of(tmp_path / "a.tar")[1].captions_not_utf8 == 1


def parquet(rows) -> bytes:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    tables.write_table(arrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_of_an_imagefolder_is_columns(tmp_path, kind):
    write(tmp_path, a_png=0, a_txt="beside", sub__b_png=1, deep__er__c_png=2, d_png=3)
    top = [{"file_name": "a.png", "text": "one, two"}, {"file_name": "sub/b.png", "text": "two"}]
    deep = [{"file_name": "er/c.png", "text": "three"}]
    for folder, lines in ((tmp_path, top), (tmp_path / "deep", deep)):
        if kind == "jsonl":
            (folder / "metadata.jsonl").write_text(jsonl(*lines))
        elif kind == "parquet":
            (folder / "metadata.parquet").write_bytes(parquet(lines))
        else:
            rows = [f'{line["file_name"]},"{line["text"]}"' for line in lines]
            (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    found, listing = columns_of(tmp_path)
    assert found == {
        "a.png": {"txt": "beside", "text": "one, two"},
        "d.png": {},
        "deep/er/c.png": {"text": "three"},
        "sub/b.png": {"text": "two"},
    }
    assert (listing.ignored, listing.notes) == (1 + 2, [])


def test_captions_that_cannot_be_used_are_counted(tmp_path):
    write(tmp_path, a_png=0, a_txt=b"x" * (2**20 + 1), b_png=1, b_txt=b"\xff latin", c_png=2)
    (tmp_path / "c.txt").mkdir()
    lines = '\n{"file_name": "a.png", "score": 1e999}\nno JSON\n{"text": "of none"}\n{"file_name": "gone.png"}\n[1]\n'
    (tmp_path / "metadata.jsonl").write_text(lines + '{"file_name": "./b.png", "n": 1}\n')
    found, listing = columns_of(tmp_path)
    assert found == {"a.png": {}, "b.png": {"txt": "\udcff latin", "n": 1}, "c.png": {}}
    assert listing.notes == [
        "1 captions are larger than 1048576 bytes and left out",
        "1 captions are of files that are not among the images",
        "1 captions cannot be read",
        "4 captions of metadata.jsonl have no file_name or are no JSON, and are left out",
    ]


def test_metadata_of_parquet_has_the_columns_that_json_can_hold(tmp_path):
    write(tmp_path, a_png=0, b_png=1)
    rows = [{"file_name": "a.png", "n": float("nan"), "raw": b"x", "tags": ["one"]}, {"file_name": None, "n": 2.0}]
    (tmp_path / "metadata.parquet").write_bytes(parquet(rows))
    found, listing = columns_of(tmp_path)
    assert found == {"a.png": {"n": None, "tags": ["one"]}, "b.png": {}}
    assert listing.notes == ["1 captions of metadata.parquet have no file_name or are no JSON, and are left out"]


def test_metadata_that_is_no_parquet_or_cannot_be_read_without_pyarrow_is_named(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    write(tmp_path, a_png=0, metadata_parquet=b"PAR1 no more")
    found, listing = columns_of(tmp_path)
    assert found == {"a.png": {}}
    (note,) = listing.notes
    assert note.startswith("1 captions of metadata.parquet cannot be read: metadata.parquet is not readable as Parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert columns_of(tmp_path)[1].notes == [
        "1 captions of metadata.parquet cannot be read: Parquet needs pyarrow: pip install pyarrow"
    ]


def test_captions_of_a_url_are_columns():
    memory = pytest.importorskip("fsspec", reason="fsspec is not installed").filesystem("memory")
    files = {
        "a.png": png(0),
        "a.txt": b"a cat",
        "sub/b.png": png(1),
        "metadata.jsonl": jsonl({"file_name": "sub/b.png", "n": 2}),
    }
    for name, data in files.items():
        memory.pipe(f"/captions/{name}", data if isinstance(data, bytes) else data.encode())
    found, listing = columns_of("memory://captions")
    assert (found, listing.ignored) == ({"a.png": {"txt": "a cat"}, "sub/b.png": {"n": 2}}, 2)


def test_captions_ride_along_in_the_store_and_are_added_later(tmp_path):
    write(tmp_path / "in", a_png=0, a_txt="a cat", b_png=1)
    options = {"vae": small_vae(), "buckets": 16, "dtype": "fp32", "device": "cpu", "progress": False}
    assert encode(tmp_path / "in", tmp_path / "out", captions="none", **options).ok == 2
    assert Store.open(tmp_path / "out").columns() == {"a.png": {}, "b.png": {}}
    report = encode(tmp_path / "in", tmp_path / "out", **options)
    assert (report.ok, report.resumed) == (0, 2)
    assert Store.open(tmp_path / "out").columns() == {"a.png": {"txt": "a cat"}, "b.png": {}}
