"""Sources under a URL, and the status of files in fsspec's file systems."""

import io
import tarfile
from datetime import UTC, datetime

import pytest
from support.small_store import picture

from fastvae.data.images.errors import ImageError
from fastvae.data.sources import open as opening
from fastvae.data.sources import storage
from fastvae.data.sources.open import locate_files, open_source


@pytest.fixture
def memory():
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def put(files, path, image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    files.pipe_file(path, buffer.getvalue())
    return buffer.getvalue()


def test_a_folder_and_a_pattern_under_a_url(memory):
    first, second = put(memory, "/bucket/a/0.png", picture(0)), put(memory, "/bucket/a/b/1.png", picture(1))
    memory.pipe_file("/bucket/a/0.txt", b"caption")
    memory.pipe_file("/bucket/a/.hidden.png", b"x")
    put(memory, "/elsewhere/2.png", picture(2))
    source = open_source("memory://bucket/a")
    listing = source.listing()
    assert [file.key for file in listing.files] == ["0.png", "b/1.png"]
    assert [source.read(file) for file in listing.files] == [first, second]
    assert listing.ignored == 2
    assert [file.size for file in listing.files] == [len(first), len(second)]
    again = open_source("memory://bucket/a").listing().files
    assert again == listing.files
    put(memory, "/bucket/a/0.png", picture(0))
    assert open_source("memory://bucket/a").listing().files[0].mtime_ns > listing.files[0].mtime_ns
    source = open_source("memory://bucket/**/[01].png")
    assert [file.key for file in source.listing().files] == ["a/0.png", "a/b/1.png"]
    memory.rm("/bucket/a/0.png")
    with pytest.raises(ImageError, match=r"a/0\.png cannot be read"):
        source.read(source.listing().files[0].__class__("a/0.png", 1, 1))
    with pytest.raises(ValueError, match="src must hold images, there is none under"):
        open_source("memory://bucket/empty").listing()


def test_a_url_of_files_that_hold_images_is_answered_with_their_pattern(memory):
    memory.pipe_file("/bucket/tars/deep/a.tar", b"x")
    with pytest.raises(ValueError, match=r"files: 'memory://bucket/tars/\*\*/\*\.tar'$"):
        open_source("memory://bucket/tars").listing()
    assert locate_files(["memory://bucket/tars/**/*.tar"])[1] == ["deep/a.tar"]


def test_archives_tables_and_manifests_under_a_url(memory):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet's reader is not installed")
    arrow = pytest.importorskip("pyarrow", reason="Parquet's reader is not installed")
    data = [put(memory, f"/bucket/in/{seed}.png", picture(seed)) for seed in range(3)]
    with memory.open("/bucket/in/t-0.tar", "wb") as opened, tarfile.open(fileobj=opened, mode="w") as tar:
        info = tarfile.TarInfo("t.png")
        info.size = len(data[0])
        tar.addfile(info, io.BytesIO(data[0]))
    with memory.open("/bucket/in/p.parquet", "wb") as opened:
        parquet.write_table(arrow.table({"key": ["p"], "image": [data[1]]}), opened)
    memory.pipe_file("/bucket/in/m.jsonl", b'{"key": "m", "path": "2.png"}\n{"key": "n", "path": "/etc/passwd"}\n')
    for name, key, seed in (("t-*.tar", "t", 0), ("t-{0..0}.tar", "t", 0), ("p.parquet", "p", 1), ("m.jsonl", "m", 2)):
        source = open_source(f"memory://bucket/in/{name}")
        file = source.listing().files[0]
        assert file.key == key
        assert source.read(file) == data[seed]
    with pytest.raises(ImageError, match="Not a path under memory://bucket/in"):
        source.read(source.listing().files[1])


def test_row_31_a_manifest_may_name_urls_of_allowed_schemes(tmp_path, memory):
    data = put(memory, "/bucket/0.png", picture(0))
    (tmp_path / "m.jsonl").write_text('{"key": "a", "uri": "memory://bucket/0.png"}\n')
    with pytest.raises(ValueError, match="memory:// is not allowed unless"):
        open_source(tmp_path / "m.jsonl").listing()
    source = open_source(tmp_path / "m.jsonl", schemes=("memory",))
    (file,) = source.listing().files
    assert source.read(file) == data
    assert file.size == len(data)
    (tmp_path / "m.jsonl").write_text('{"key": "a", "uri": "file:///etc/passwd"}\n')
    with pytest.raises(ValueError, match="file:// is not allowed, write"):
        open_source(tmp_path / "m.jsonl", schemes=("memory", "file")).listing()


def test_without_fsspec_the_error_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(storage, "import_module", missing)
    with pytest.raises(ValueError, match=r"memory:// needs fsspec: pip install fsspec$"):
        open_source("memory://bucket")


class KeepsTheScheme:
    """File system like fsspec's HTTP: a path is the URL, also in the results of glob."""

    def _strip_protocol(self, url):
        return url

    def glob(self, url):
        return [url.replace("*", number) for number in "10"]


@pytest.mark.parametrize("name", ["{0..1}.tar", "*.tar"])
def test_places_in_a_file_system_whose_paths_are_urls(monkeypatch, name):
    monkeypatch.setattr(opening, "open_remote", lambda url: storage.RemoteStorage(url, KeepsTheScheme()))
    where, places = opening.locate_files([f"https://host/x/{name}"])
    assert places == ["0.tar", "1.tar"]
    assert where.path(places[1]) == "https://host/x/1.tar"
    with pytest.raises(OSError, match="Not a path under"):
        where.path("/1.tar")


@pytest.mark.parametrize(
    "facts",
    [
        {"LastModified": datetime(2020, 1, 2, 0, 0, 0, 250_000, tzinfo=UTC)},
        {"last_modified": "2020-01-02T01:00:00.250+01:00", "created": 7},
        {"mtime": 1_577_923_200.25},
        {"created": datetime(2020, 1, 2, 0, 0, 0, 250_000), "updated": "some day"},
    ],
)
def test_mtime_from_every_field_of_fsspec(facts):
    place = storage.RemoteStorage("memory://", None)
    assert place.note("x", {"size": 3, **facts}) == (3, 1_577_923_200_250_000_000)


def test_mtime_from_an_etag_if_there_is_no_time():
    place = storage.RemoteStorage("memory://", None)
    first, second = (place.note("x", {"size": 3, "ETag": tag})[1] for tag in ("a", "b"))
    assert first != second
    assert min(first, second) > 0
    assert max(first, second) < 2**63
    assert place.note("x", {"size": 3}) == (3, 0)
