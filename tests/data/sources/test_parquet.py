"""Parquet files: rows by key, read one row group at a time; no URL is opened."""

import datetime
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from data.sources.numbered_images import png, seeds_of

from fastvae.data.images.errors import ImageError
from fastvae.data.sources import parquet as parquet_source
from fastvae.data.sources.open import open_source

arrow = pytest.importorskip("pyarrow", reason="Parquet's reader is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet's reader is not installed")


def table(path, columns, **options):
    parquet.write_table(arrow.table(columns), path, **options)
    return path


def key_order(count):
    return [f"k{(7 * index) % count:02d}" for index in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "Hugging Face's struct"])
def test_every_row_has_its_own_image_and_columns(tmp_path, kind):
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


def test_images_are_read_one_row_group_at_a_time_and_not_for_the_listing(tmp_path, monkeypatch):
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
    assert len(read) == 3  # the last two groups are cached


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_a_large_row_group_is_read_in_batches(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(parquet_source, "LARGE_GROUP", 6000)
    monkeypatch.setattr(parquet_source, "BATCH_BYTES", 1500)
    monkeypatch.setattr(parquet_source, "CACHED_BATCHES", 2)
    images = [png(row) for row in range(12)]
    column = images if kind == "bytes" else [{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(images)]
    path = table(tmp_path / "a.parquet", {"key": key_order(12), "image": column}, row_group_size=9, compression="none")
    source = open_source(path)
    files = source.listing().files
    batches, groups = [], []
    real, whole = parquet.ParquetFile.iter_batches, parquet.ParquetFile.read_row_group

    def counted(self, rows, row_groups, columns):
        batches.append((rows, row_groups, columns))
        return real(self, rows, row_groups=row_groups, columns=columns)

    def counted_group(self, group, columns):
        groups.append(group)
        return whole(self, group, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted_group)
    in_order = sorted(files, key=lambda file: int(file.place.split("#")[1]))
    assert [source.read(file) for file in in_order] == images
    assert groups == [1]  # the small one
    assert batches == [(1, [0], ["image"])]  # the group is unpacked once for all its rows
    shuffled = files * 2
    random.Random(0).shuffle(shuffled)
    assert all(source.read(file) == images[int(file.place.split("#")[1])] for file in shuffled)


@pytest.mark.slow
def test_a_row_group_above_2_gib_is_read(tmp_path):
    head, rows = png(3), 35
    schema = arrow.schema([("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))])
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        one = arrow.array([{"bytes": head + bytes(2**26), "path": "a.png"}], schema.field("image").type)
        chunks = arrow.chunked_array([one] * rows)
        writer.write_table(arrow.table({"image": chunks}, schema), row_group_size=rows)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    source = open_source(tmp_path / "a.parquet")
    files = source.listing().files
    assert len(files) == rows
    for file in files[::17]:
        assert source.read(file)[: len(head)] == head


def test_values_that_repeat_to_more_than_2_gib_are_read_in_batches(tmp_path, monkeypatch):
    """Their size in the file is that of one value, so that the group looks small."""

    def refused(self, group, columns):
        raise arrow.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    images = [png(row % 2) for row in range(8)]
    source = open_source(table(tmp_path / "a.parquet", {"key": [*"abcdefgh"], "image": images}))
    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "read_row_group", refused)
        files = source.listing().files
        assert [source.read(file) for file in files] == images


@pytest.mark.parametrize("view", [True, False])
def test_view_types_are_read_like_their_plain_ones(tmp_path, view):
    binary, string = (arrow.binary_view(), arrow.string_view()) if view else (arrow.binary(), arrow.string())
    struct = arrow.struct([("bytes", binary), ("path", string)])
    images = [png(seed) for seed in range(3)]
    columns = {
        "key": arrow.array(["a", "b", "c"], string),
        "image": arrow.array(images, binary),
        "pair": arrow.array([{"bytes": data, "path": "x.png"} for data in images], struct),
        "caption": arrow.array(["ü", None, "third"], string),
        "tags": arrow.array([["x"], [], None], arrow.list_view(string) if view else arrow.list_(string)),
    }
    path = table(tmp_path / "a.parquet", columns)
    for column in ("image", "pair"):
        source = open_source(path, image_column=column)
        listing = source.listing()
        assert seeds_of(source, listing.files) == {"a": 0, "b": 1, "c": 2}
        captions = [{"caption": "ü", "tags": ["x"]}, {"caption": None, "tags": []}, {"caption": "third", "tags": None}]
        assert [dict(file.columns) for file in listing.files] == captions
        assert listing.notes == [
            f"columns that are no JSON values are left out: {'image' if column == 'pair' else 'pair'}"
        ]


@pytest.mark.parametrize("kind", ["large", "dictionary"])
def test_large_and_dictionary_encoded_values_are_read_like_plain_ones(tmp_path, kind):
    images, names = [png(seed) for seed in range(3)], ["a", "b", "b"]
    if kind == "large":
        data, keys = arrow.array(images, arrow.large_binary()), arrow.array(names, arrow.large_string())
    else:
        data, keys = arrow.array(images, arrow.binary()).dictionary_encode(), arrow.array(names).dictionary_encode()
    pairs = arrow.StructArray.from_arrays([data, keys], ["bytes", "path"])
    columns = {"image": data, "pair": pairs, "caption": keys}
    path = table(tmp_path / "a.parquet", {"key": keys, **columns}, row_group_size=2)
    table(tmp_path / "b.parquet", {"image": pairs, "caption": keys}, row_group_size=2)
    for source in (open_source(path), open_source(path, image_column="pair"), open_source(tmp_path / "b.parquet")):
        files = source.listing().files
        assert seeds_of(source, files) == {"a": 0, "b": 1, "b~2": 2}
        assert [file.columns["caption"] for file in files] == names


def test_a_file_without_a_key_column_takes_the_path_else_file_and_row(tmp_path):
    """As the Hub's own Parquet files are: an image column of bytes and path, and a label."""
    (tmp_path / "more").mkdir()
    rows = [{"bytes": png(0), "path": "one.png"}, {"bytes": png(1), "path": None}, {"bytes": png(2), "path": "one.png"}]
    table(tmp_path / "train-0.parquet", {"image": rows, "label": [3, 1, 4]})
    table(tmp_path / "more" / "train-1.parquet", {"image": [png(3), png(4)]})
    source = open_source(tmp_path / "train-0.parquet")
    listing = source.listing()
    assert seeds_of(source, listing.files) == {"one.png": 0, "train-0.parquet#1": 1, "one.png~2": 2}
    assert listing.duplicates == 1
    assert {file.key: file.columns for file in listing.files}["one.png~2"] == {"label": 4}
    source = open_source([tmp_path / "train-0.parquet", tmp_path / "more" / "train-1.parquet"])
    found = seeds_of(source, source.listing().files)
    assert found["train-1.parquet#0"] == 3
    assert found["train-1.parquet#1"] == 4


def test_a_pattern_crosses_folders_and_takes_the_files_of_the_first(tmp_path):
    """As the repositories of the Hub have them: data/train.parquet and data/part/train.parquet."""
    for seed, folder in enumerate(["data", "data/part", "data/part/deep"]):
        (tmp_path / folder).mkdir(parents=True)
        table(tmp_path / folder / "a.parquet", {"key": [folder], "image": [png(seed)]})
    files = open_source(f"{tmp_path}/data/**/*.parquet").listing().files
    assert [file.key for file in files] == ["data", "data/part", "data/part/deep"]


def test_concurrent_reads_return_their_own_rows(tmp_path):
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


def test_concurrent_reads_of_a_row_group_read_it_once(tmp_path, monkeypatch):
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


def test_columns_without_json_values_are_left_out_and_named(tmp_path):
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


def test_duplicate_keys_get_a_suffix(tmp_path):
    table(tmp_path / "a-0.parquet", {"id": ["x", "x", "y"], "img": [png(0), png(1), png(2)]})
    table(tmp_path / "a-1.parquet", {"id": ["y"], "img": [png(3)]})
    source = open_source(f"{tmp_path}/a-*.parquet", image_column="img", key_column="id")
    listing = source.listing()
    assert listing.duplicates == 2
    assert seeds_of(source, listing.files) == {"x": 0, "x~2": 1, "y": 2, "y~2": 3}


def test_a_row_without_bytes_reads_the_file_it_names_but_no_url(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "3.png").write_bytes(png(3))
    paths = ["in/3.png", "https://somewhere/3.png", "file:///etc/passwd", "gone.png", None, "nul\0.png"]
    rows = [{"bytes": None, "path": path} for path in paths]
    source = open_source(table(tmp_path / "a.parquet", {"key": list("abcdef"), "image": rows}))
    files = source.listing().files
    assert seeds_of(source, files[:1]) == {"a": 3}
    expected = [
        "https:// is not allowed unless",
        "file:// is not allowed, write",
        "No such file",
        "neither bytes nor a path",
        "a NUL",
    ]
    for file, message in zip(files[1:], expected, strict=True):
        with pytest.raises(ImageError, match=message):
            source.read(file)


def test_a_changed_file_is_refused(tmp_path):
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
    ("columns", "options", "message"),
    [
        ({"key": ["a"], "picture": [b""]}, {}, r"image_column must be a column of a\.parquet, got 'image', it has"),
        ({"name": ["a"], "image": [b""]}, {"key_column": "key"}, "key_column must be a column of"),
        ({"key": ["a"], "image": ["a.png"]}, {}, "image_column must hold bytes or .* is string"),
        ({"key": ["a", None], "image": [b"", b""]}, {}, r"a\.parquet row 1: key must be text or an integer, got None"),
        ({"key": [0.5], "image": [b""]}, {}, "key must be text or an integer"),
        ({"key": arrow.array([], arrow.string()), "image": arrow.array([], arrow.binary())}, {}, "src must hold rows"),
    ],
)
def test_a_table_without_the_right_columns_is_refused(tmp_path, columns, options, message):
    path = table(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        open_source(path, **options).listing()


def test_a_damaged_file_or_row_is_refused(tmp_path):
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


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(parquet_source, "import_module", missing)
    with pytest.raises(ValueError, match=r"Parquet needs pyarrow: pip install pyarrow$"):
        open_source(tmp_path / "a.parquet")
