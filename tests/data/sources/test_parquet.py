"""Parquet files and JSONL manifests: rows by their key, read lazily, and no path or URL that was not asked for."""

import datetime
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.small_store import picture

from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import read_image
from fastvae.data.sources import parquet as table_source
from fastvae.data.sources.open import open_source

arrow = pytest.importorskip("pyarrow", reason="Parquet's reader is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet's reader is not installed")


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 24, 16).save(buffer, "PNG")
    return buffer.getvalue()


def table(path, columns, **options):
    parquet.write_table(arrow.table(columns), path, **options)
    return path


def seeds_of(source, files):
    """Which picture(seed) each row's bytes are: told by their pixels, not by their names."""
    known = {np.asarray(picture(seed, 24, 16)).tobytes(): seed for seed in range(12)}
    return {file.key: known[np.asarray(read_image(source.read(file)).image).tobytes()] for file in files}


def key_order(count):
    return [f"k{(7 * index) % count:02d}" for index in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "Hugging Face's struct"])
def test_every_row_is_its_own_image_and_columns(tmp_path, kind):
    images = [png(seed) for seed in range(10)]
    column = arrow.array(images, arrow.large_binary() if kind == "large bytes" else arrow.binary())
    if kind == "Hugging Face's struct":
        column = arrow.array([{"bytes": data, "path": "elsewhere.png"} for data in images])
    columns = {"caption": [f"c{seed}" for seed in range(10)], "tags": [["a", str(seed)] for seed in range(10)]}
    path = table(tmp_path / "a.parquet", {"key": key_order(10), "image": column, **columns}, row_group_size=3)
    source = open_source(path)
    files = source.listing().files
    assert [file.key for file in files] == sorted(key_order(10))
    assert seeds_of(source, files) == {key: seed for seed, key in enumerate(key_order(10))}
    for file in files:
        seed = key_order(10).index(file.key)
        assert file.columns == {"caption": f"c{seed}", "tags": ["a", str(seed)]}
        assert file.place == f"a.parquet#{seed}"
        assert (file.size, file.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_rows_are_read_a_group_at_a_time_and_images_not_for_the_listing(tmp_path, monkeypatch):
    read = []
    real = parquet.ParquetFile.read_row_group

    def counted(self, group, columns):
        read.append((group, tuple(columns)))
        return real(self, group, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    columns = {"key": [f"{row:02d}" for row in range(12)], "image": [png(row) for row in range(12)], "n": range(12)}
    source = open_source(table(tmp_path / "a.parquet", columns, row_group_size=4))
    files = source.listing().files
    assert read == [(group, ("key", "n")) for group in range(3)]
    read.clear()
    assert seeds_of(source, files) == {f"{row:02d}": row for row in range(12)}
    assert read == [(group, ("image",)) for group in range(3)]
    assert seeds_of(source, files[4:]) == {f"{row:02d}": row for row in range(4, 12)}
    assert len(read) == 3  # the two used last are kept


def test_threads_that_read_at_once_get_their_own_rows(tmp_path):
    columns = {"key": [f"{row:02d}" for row in range(12)], "image": [png(row) for row in range(12)]}
    source = open_source(table(tmp_path / "a.parquet", columns, row_group_size=2))
    files, wrong = source.listing().files, []

    def read(number):
        for step in range(60):
            row = (step * (number * 2 + 1) + number) % 12
            if source.read(files[row]) != columns["image"][row]:
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_ask_for_neighbours_wait_for_one_reading(tmp_path, monkeypatch):
    reads = []
    real = parquet.ParquetFile.read_row_group

    def slow(self, group, columns):
        reads.append(group)
        time.sleep(0.1)
        return real(self, group, columns=columns)

    source = open_source(table(tmp_path / "a.parquet", {"key": list("abcd"), "image": [png(row) for row in range(4)]}))
    files = source.listing().files
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", slow)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, files)) == [png(row) for row in range(4)]
    assert reads == [0]


def test_columns_are_json_or_named_as_left_out(tmp_path):
    columns = {
        "key": [1, 2],
        "image": [png(0), png(1)],
        "score": [0.5, float("nan")],
        "note": [None, "ü"],
        "pair": [{"x": [float("inf"), 1.0]}, {"x": []}],
        "when": [datetime.datetime(2020, 1, 1)] * 2,
        "mask": [b"\0", b"\1"],
    }
    listing = open_source(table(tmp_path / "a.parquet", columns)).listing()
    assert [file.key for file in listing.files] == ["1", "2"]
    assert [file.columns for file in listing.files] == [
        {"score": 0.5, "note": None, "pair": {"x": [None, 1.0]}},
        {"score": None, "note": "ü", "pair": {"x": []}},
    ]
    json.dumps([file.columns for file in listing.files], allow_nan=False)
    assert listing.notes == ["columns that are no JSON values are left out: mask, when"]


def test_duplicate_keys_over_files_are_kept_apart(tmp_path):
    table(tmp_path / "a-0.parquet", {"id": ["x", "x", "y"], "img": [png(0), png(1), png(2)]})
    table(tmp_path / "a-1.parquet", {"id": ["y"], "img": [png(3)]})
    source = open_source(f"{tmp_path}/a-*.parquet", image_column="img", key_column="id")
    listing = source.listing()
    assert listing.duplicates == 2
    assert seeds_of(source, listing.files) == {"x": 0, "x~2": 1, "y": 2, "y~2": 3}


def test_a_row_without_bytes_is_the_file_it_names_and_no_url(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "3.png").write_bytes(png(3))
    paths = ["in/3.png", "https://somewhere/3.png", "file:///etc/passwd", "gone.png", None, "nul\0.png"]
    rows = [{"bytes": None, "path": path} for path in paths]
    source = open_source(table(tmp_path / "a.parquet", {"key": list("abcdef"), "image": rows}))
    files = source.listing().files
    assert seeds_of(source, files[:1]) == {"a": 3}
    expected = ["https:// is off", "file:// is not taken", "No such file", "neither bytes nor a path", "a NUL"]
    for file, said in zip(files[1:], expected, strict=True):
        with pytest.raises(ImageError, match=said):
            source.read(file)


def test_a_table_that_was_changed_gives_no_other_rows_image(tmp_path):
    path = table(tmp_path / "a.parquet", {"key": ["a", "b"], "image": [png(0), png(1)]})
    source = open_source(path)
    files = source.listing().files
    assert source.read(files[0]) == png(0)
    table(path, {"key": ["b", "a"], "image": [png(1), png(0)]})
    os.utime(path, ns=(0, files[0].mtime_ns + 1))
    with pytest.raises(ImageError, match=r"a\.parquet was changed since it was listed") as caught:
        source.read(files[0])
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"key": ["a"], "picture": [b""]}, {}, r"image_column must be a column of a\.parquet, got 'image', it has"),
        ({"name": ["a"], "image": [b""]}, {}, "key_column must be a column of"),
        ({"key": ["a"], "image": ["a.png"]}, {}, "image_column must hold bytes or .* is string"),
        ({"key": ["a", None], "image": [b"", b""]}, {}, r"a\.parquet row 1: key must be text or an integer, got None"),
        ({"key": [0.5], "image": [b""]}, {}, "key must be text or an integer"),
        ({"key": arrow.array([], arrow.string()), "image": arrow.array([], arrow.binary())}, {}, "no rows in"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_words(tmp_path, columns, options, said):
    path = table(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=said):
        open_source(path, **options).listing()


def test_a_damaged_table_is_refused_or_its_rows_are(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not readable as Parquet"):
        open_source(path).listing()
    table(path, {"key": ["a"], "image": [png(0)]}, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = parquet.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    data[place : place + 16] = b"\xff" * 16
    path.write_bytes(data)
    source = open_source(path)
    (file,) = source.listing().files
    with pytest.raises(ImageError, match="not readable as Parquet") as caught:
        source.read(file)
    assert caught.value.reason == "decode_error"


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(table_source, "import_module", missing)
    with pytest.raises(ValueError, match=r"Parquet needs pyarrow: pip install 'fastvae\[data\]'"):
        open_source(tmp_path / "a.parquet")


# Manifests


def manifest(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_manifest_names_files_beside_it_and_elsewhere(tmp_path):
    for place in ("in/images", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "in" / "images" / "0.png").write_bytes(png(0))
    (tmp_path / "elsewhere" / "1.png").write_bytes(png(1))
    entries = [
        {"key": "near", "path": "images/0.png", "caption": "c", "more": {"n": [1, None]}},
        {"key": "far", "uri": str(tmp_path / "elsewhere" / "1.png"), "path": 3},
        {"key": 7, "path": "../elsewhere/1.png"},
        {"key": "near", "path": "images/gone.png"},
    ]
    path = manifest(tmp_path / "in" / "m.jsonl", entries)
    path.write_text(path.read_text() + "\n  \n")
    source = open_source(path)
    listing = source.listing()
    assert [file.key for file in listing.files] == ["7", "far", "near", "near~2"]
    assert seeds_of(source, listing.files[:3]) == {"7": 1, "far": 1, "near": 0}
    assert [dict(file.columns) for file in listing.files] == [
        {},
        {"path": 3},
        {"caption": "c", "more": {"n": [1, None]}},
        {},
    ]
    assert listing.files[2].size == len(png(0))
    assert listing.files[2].mtime_ns == (tmp_path / "in" / "images" / "0.png").stat().st_mtime_ns
    assert listing.duplicates == 1
    with pytest.raises(ImageError, match="near~2 cannot be read: No such file"):
        source.read(listing.files[3])
    named = manifest(tmp_path / "in" / "n.jsonl", [{"file_name": "images/0.png", "text": "t"}])
    files = open_source(named, image_column="file_name", key_column="file_name").listing().files
    assert [(file.key, file.columns) for file in files] == [("images/0.png", {"text": "t"})]


def test_manifests_of_several_folders_keep_to_their_own(tmp_path):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x.png").write_bytes(png(number))
        manifest(tmp_path / str(number) / "m.jsonl", [{"key": f"from {number}", "path": "x.png"}])
    for src in ([tmp_path / "0" / "m.jsonl", tmp_path / "1" / "m.jsonl"], f"{tmp_path}/*/m.jsonl"):
        source = open_source(src)
        assert seeds_of(source, source.listing().files) == {"from 0": 0, "from 1": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"key": "a", "path": "file:///etc/passwd"}', "m.jsonl line 2: file:// is not taken, write the path alone"),
        ('{"key": "a", "path": "FILE://x"}', "file:// is not taken"),
        ('{"key": "a", "uri": "https://x/y.png"}', "m.jsonl line 2: https:// is off; it is taken where schemes names"),
        ('{"key": "a", "uri": "s3://x/y.png"}', "s3:// is off"),
        ('{"key": "a"}', "image or path or uri must name an image's file"),
        ('{"key": "a", "path": ""}', "must name an image's file"),
        ('{"key": "a", "path": "nul\\u0000.png"}', "must name an image's file"),
        ('{"path": "a.png"}', "m.jsonl line 2: key must be text or an integer, got None"),
        ('{"key": "\\ud800", "path": "a.png"}', "half a surrogate pair"),
        ('{"key": "a", "path": "a.png", "score": NaN}', "line 2 is no JSON: NaN is no JSON"),
        ('["a", "b"]', "line 2 must be an object"),
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
    ],
)
def test_a_line_that_cannot_be_taken_is_refused_by_its_number(tmp_path, line, said):
    (tmp_path / "m.jsonl").write_text('{"key": "ok", "path": "ok.png"}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path / "m.jsonl").listing()


def test_a_manifest_that_is_empty_or_missing_says_so(tmp_path):
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no lines in"):
        open_source(tmp_path / "m.jsonl").listing()
    with pytest.raises(ValueError, match=r"src names n\.jsonl, which cannot be read"):
        open_source(tmp_path / "n.jsonl").listing()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_in_a_manifest_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(manifest(tmp_path / "m.jsonl", [{"key": "a", "path": "pipe.png"}]))
    (file,) = source.listing().files
    with pytest.raises(ImageError, match="Not a regular file"):
        source.read(file)
