"""What counts as an image of a folder, a pattern or a URL, in which order, and that odd folders end."""

import io
import os
import re
import tarfile
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_store import picture, write_pictures

from fastvae.data.images.errors import ImageError
from fastvae.data.rows import SourceFile
from fastvae.data.sources import open as opening
from fastvae.data.sources import storage as file_systems
from fastvae.data.sources.folder import list_folder
from fastvae.data.sources.open import open_source
from fastvae.data.sources.patterns import expand_braces
from fastvae.data.sources.source import Listing


def keys(root, **options):
    return [file.key for file in list_folder(root, **options).files]


def test_recursive_sorted_and_relative(tmp_path):
    write_pictures(tmp_path / "b" / "deep", 1)
    write_pictures(tmp_path / "a", 2)
    write_pictures(tmp_path, 1)
    (tmp_path / "a" / "caption.txt").write_text("not a picture")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"x")
    listing = list_folder(tmp_path)
    assert [file.key for file in listing.files] == ["000.png", "a/000.png", "a/001.png", "b/deep/000.png"]
    assert listing.ignored == 2
    assert listing.files[0].size == (tmp_path / "000.png").stat().st_size


def test_content_counts_where_the_suffix_says_nothing(tmp_path):
    picture(0).save(tmp_path / "no suffix", "PNG")
    picture(0).save(tmp_path / "upper.JPG", "JPEG")
    (tmp_path / "notes").write_text("words")
    (tmp_path / "phone.heic").write_bytes(b"not taken, and not lost")
    assert keys(tmp_path) == ["no suffix", "phone.heic", "upper.JPG"]


def test_row_13_odd_names_survive(tmp_path):
    names = ["new\nline.png", "ünï 😀.png", "-rf.png", os.fsdecode(b"not utf-8 \xff.png")]
    for name in names:
        picture(0).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", tmp_path / name)
    assert sorted(keys(tmp_path)) == sorted(names)


def test_row_12_links_are_followed_once_and_loops_end(tmp_path, monkeypatch):
    write_pictures(tmp_path / "real", 1)
    write_pictures(tmp_path / "elsewhere", 1)
    for index in range(3):
        os.symlink(tmp_path / "real", tmp_path / "real" / f"loop{index}")
    os.symlink(tmp_path, tmp_path / "real" / "up")
    os.symlink(tmp_path / "elsewhere", tmp_path / "a link that sorts first")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "dangling.png")
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (listed.append(os.path.realpath(folder)), real(folder))[1])
    assert keys(tmp_path) == ["dangling.png", "elsewhere/000.png", "real/000.png"]
    assert sorted(listed) == sorted(str(folder) for folder in (tmp_path, tmp_path / "elsewhere", tmp_path / "real"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_opened(tmp_path):
    write_pictures(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    assert keys(tmp_path) == ["000.png"]


def test_the_output_inside_the_source_is_not_read(tmp_path):
    write_pictures(tmp_path, 1)
    write_pictures(tmp_path / "out", 1)
    assert keys(tmp_path, exclude=tmp_path / "out") == ["000.png"]
    assert keys(tmp_path, exclude=tmp_path / "not there") == ["000.png", "out/000.png"]


def test_an_empty_source_says_so(tmp_path):
    with pytest.raises(ValueError, match="no images under"):
        list_folder(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"1 other files passed over"):
        list_folder(tmp_path)
    with pytest.raises(ValueError, match="must be a folder of images"):
        list_folder(tmp_path / "a.txt")


# Patterns


def test_a_pattern_takes_what_it_says_from_any_depth(tmp_path):
    for folder in ("a", "a/b", "a/b/c", "z"):
        write_pictures(tmp_path / folder, 1)
        picture(0).save(tmp_path / folder / "x.jpg")
        (tmp_path / folder / "caption.txt").write_text("not a picture")
    cases = {
        "a/*.png": ["000.png"],
        "a/*": ["000.png", "x.jpg"],
        "*/*.jpg": ["a/x.jpg", "z/x.jpg"],
        "**/*.png": ["000.png", "a/000.png", "a/b/000.png", "a/b/c/000.png", "z/000.png"],
        "a/**/*.{jpg,png}": ["000.png", "b/000.png", "b/c/000.png", "b/c/x.jpg", "b/x.jpg", "x.jpg"],
        "{a,z}/00?.png": ["a/000.png", "z/000.png"],
        "**/b/[!x]*": ["a/b/000.png"],
        "{z,*}/x.jpg": ["a/x.jpg", "z/x.jpg"],
    }
    write_pictures(tmp_path, 1)
    for pattern, expected in cases.items():
        source = open_source(f"{tmp_path}/{pattern}")
        files = source.listing().files
        assert [file.key for file in files] == expected, pattern
        assert all(source.read(file).is_file() for file in files), pattern


def test_a_pattern_does_not_go_round_in_circles_or_into_the_output(tmp_path):
    write_pictures(tmp_path / "in", 1)
    write_pictures(tmp_path / "out", 1)
    for index in range(3):
        os.symlink(tmp_path / "in", tmp_path / "in" / f"loop{index}")
    for pattern in ("**/*.png", "*/*.png"):
        source = open_source(f"{tmp_path}/{pattern}")
        assert [file.key for file in source.listing(exclude=tmp_path / "out").files] == ["in/000.png"]


@pytest.mark.parametrize("name", ["holiday [2020]", "unpacked.tar", "table.parquet"])
def test_a_folder_whose_name_looks_like_something_else_is_a_folder(tmp_path, name):
    write_pictures(tmp_path / name, 2)
    source = open_source(tmp_path / name)
    assert [file.key for file in source.listing().files] == ["000.png", "001.png"]
    assert source.read(source.listing().files[0]).is_file()


def test_relative_patterns_start_where_the_process_runs(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 1)
    monkeypatch.chdir(tmp_path)
    for pattern, key in (("in/*", "000.png"), ("*/*.png", "in/000.png"), ("**/*.png", "in/000.png")):
        source = open_source(pattern)
        (file,) = source.listing().files
        assert file.key == key
        assert source.read(file).is_file()


@pytest.mark.parametrize(
    ("src", "said"),
    [
        ([], "src must be a path, a pattern or a list"),
        ([""], "src must be a path, a pattern or a list"),
        (["a.tar", "b.parquet"], "files of one kind"),
        (["folder", "other"], "must be one folder or pattern"),
        ("[z-a]/**", "src must be a pattern"),
        ("no such *.png", "no images match"),
        ("file:///etc", "must be written as a path, without a scheme"),
        ("nosuchfilesystem://x", "nosuchfilesystem:// cannot be read here"),
        (["memory://a.tar", "b.tar"], "files of one file system"),
    ],
)
def test_what_is_no_source_is_refused_in_words(tmp_path, monkeypatch, src, said):
    write_pictures(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        open_source(src).listing()


def test_ranges_keep_their_zeros_and_other_braces_stay():
    assert expand_braces("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{x}.tar") == ["{x}.tar"]


# File systems of fsspec


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
    with pytest.raises(ValueError, match="no images under"):
        open_source("memory://bucket/empty").listing()


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


def test_row_31_a_manifest_may_name_urls_where_their_scheme_is_taken(tmp_path, memory):
    data = put(memory, "/bucket/0.png", picture(0))
    (tmp_path / "m.jsonl").write_text('{"key": "a", "uri": "memory://bucket/0.png"}\n')
    with pytest.raises(ValueError, match="memory:// is off"):
        open_source(tmp_path / "m.jsonl").listing()
    source = open_source(tmp_path / "m.jsonl", schemes=("memory",))
    (file,) = source.listing().files
    assert source.read(file) == data
    assert file.size == len(data)
    (tmp_path / "m.jsonl").write_text('{"key": "a", "uri": "file:///etc/passwd"}\n')
    with pytest.raises(ValueError, match="file:// is not taken"):
        open_source(tmp_path / "m.jsonl", schemes=("memory", "file")).listing()


def test_without_fsspec_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(file_systems, "import_module", missing)
    with pytest.raises(ValueError, match=r"memory:// needs fsspec: pip install 'fastvae\[data\]'"):
        open_source("memory://bucket")


class KeepsTheScheme:
    """As fsspec's HTTP does it: a path is the URL, also in what a pattern finds."""

    def _strip_protocol(self, url):
        return url

    def glob(self, url):
        return [url.replace("*", number) for number in "10"]


@pytest.mark.parametrize("name", ["{0..1}.tar", "*.tar"])
def test_a_system_whose_paths_are_urls_has_the_same_places(monkeypatch, name):
    monkeypatch.setattr(opening, "open_remote", lambda url: file_systems.RemoteStorage(url, KeepsTheScheme()))
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
def test_every_file_systems_time_is_the_same_number(facts):
    place = file_systems.RemoteStorage("memory://", None)
    assert place.note("x", {"size": 3, **facts}) == (3, 1_577_923_200_250_000_000)


def test_where_no_time_is_known_another_tag_is_another_number():
    place = file_systems.RemoteStorage("memory://", None)
    first, second = (place.note("x", {"size": 3, "ETag": tag})[1] for tag in ("a", "b"))
    assert first != second
    assert min(first, second) > 0
    assert max(first, second) < 2**63
    assert place.note("x", {"size": 3}) == (3, 0)


# Names


@given(st.lists(st.sampled_from(["a", "a~2", "a~2~2", "b", "a~3"]), max_size=12))
def test_row_14_keys_are_apart_and_the_first_keeps_its_own(keys):
    listing = Listing([SourceFile(key, index, 0) for index, key in enumerate(keys)])
    listing.deduplicate_keys()
    found = [file.key for file in listing.files]
    assert len(set(found)) == len(keys)
    assert found == sorted(found)
    assert listing.duplicates == len(keys) - len(set(keys))
    by_row = {file.size: file.key for file in listing.files}
    assert all(by_row[index] == key for index, key in enumerate(keys) if key not in keys[:index])
