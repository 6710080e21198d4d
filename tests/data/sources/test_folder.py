"""Images of a folder or a pattern: which files are images, in which order, and no endless loops."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_store import picture, write_pictures

from fastvae.data.rows import SourceFile
from fastvae.data.sources.folder import list_folder
from fastvae.data.sources.open import locate_files, open_source
from fastvae.data.sources.patterns import expand_braces
from fastvae.data.sources.source import Listing


def keys(root, **options):
    return [file.key for file in list_folder(root, **options).files]


def test_images_of_sub_folders_are_sorted_by_relative_path(tmp_path):
    write_pictures(tmp_path / "b" / "deep", 1)
    write_pictures(tmp_path / "a", 2)
    write_pictures(tmp_path, 1)
    (tmp_path / "a" / "caption.txt").write_text("not a picture")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"x")
    listing = list_folder(tmp_path)
    assert [file.key for file in listing.files] == ["000.png", "a/000.png", "a/001.png", "b/deep/000.png"]
    assert listing.ignored == 2
    assert listing.files[0].size == (tmp_path / "000.png").stat().st_size


def test_a_file_without_a_known_suffix_is_recognised_by_its_content(tmp_path):
    picture(0).save(tmp_path / "no suffix", "PNG")
    picture(0).save(tmp_path / "upper.JPG", "JPEG")
    (tmp_path / "notes").write_text("words")
    (tmp_path / "phone.heic").write_bytes(b"not taken, and not lost")
    assert keys(tmp_path) == ["no suffix", "phone.heic", "upper.JPG"]


def test_row_13_odd_file_names_are_kept(tmp_path):
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


def test_the_output_inside_the_source_is_excluded(tmp_path):
    write_pictures(tmp_path, 1)
    write_pictures(tmp_path / "out", 1)
    assert keys(tmp_path, exclude=tmp_path / "out") == ["000.png"]
    assert keys(tmp_path, exclude=tmp_path / "not there") == ["000.png", "out/000.png"]


def test_a_source_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="src must hold images, there is none under"):
        list_folder(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"1 other files passed over"):
        list_folder(tmp_path)
    with pytest.raises(ValueError, match="src must be a folder of images"):
        list_folder(tmp_path / "a.txt")


@pytest.mark.parametrize("suffixes", [(".parquet",), (".tar",), (".JSONL", ".tar")])
def test_a_folder_of_files_that_hold_images_is_answered_with_their_pattern(tmp_path, suffixes):
    (tmp_path / "deep").mkdir()
    for suffix in suffixes:
        (tmp_path / "deep" / f"a{suffix}").write_bytes(b"x")
    patterns = [f"{tmp_path}/**/*{suffix}" for suffix in suffixes]
    with pytest.raises(ValueError, match=re.escape(f"files: {' or '.join(map(repr, patterns))}") + "$"):
        list_folder(f"{tmp_path}/")
    assert [locate_files([pattern])[1] for pattern in patterns] == [[f"deep/a{suffix}"] for suffix in suffixes]


# Patterns


def test_patterns_match_at_every_depth(tmp_path):
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


def test_a_pattern_follows_no_loop_of_links_and_excludes_the_output(tmp_path):
    write_pictures(tmp_path / "in", 1)
    write_pictures(tmp_path / "out", 1)
    for index in range(3):
        os.symlink(tmp_path / "in", tmp_path / "in" / f"loop{index}")
    for pattern in ("**/*.png", "*/*.png"):
        source = open_source(f"{tmp_path}/{pattern}")
        assert [file.key for file in source.listing(exclude=tmp_path / "out").files] == ["in/000.png"]


@pytest.mark.parametrize("name", ["holiday [2020]", "unpacked.tar", "table.parquet"])
def test_a_folder_named_like_a_pattern_or_an_archive_is_a_folder(tmp_path, name):
    write_pictures(tmp_path / name, 2)
    source = open_source(tmp_path / name)
    assert [file.key for file in source.listing().files] == ["000.png", "001.png"]
    assert source.read(source.listing().files[0]).is_file()


def test_relative_patterns_start_at_the_current_folder(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 1)
    monkeypatch.chdir(tmp_path)
    for pattern, key in (("in/*", "000.png"), ("*/*.png", "in/000.png"), ("**/*.png", "in/000.png")):
        source = open_source(pattern)
        (file,) = source.listing().files
        assert file.key == key
        assert source.read(file).is_file()


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ([], "src must be a path, a pattern or a list"),
        ([""], "src must be a path, a pattern or a list"),
        (["a.tar", "b.parquet"], "files of one kind"),
        ([".", "a.tar"], "must be folders and patterns, or .tar, .parquet or .jsonl files of one kind, got ., a.tar"),
        (["000.png", "."], "'000.png' is a file: quote a pattern, as in 'photos/*.jpg'"),
        ("000.png", "'000.png' is a file: quote a pattern"),
        ("[z-a]/**", "src must be a pattern"),
        ("no such *.png", "src must match an image"),
        ("file:///etc", "must be written as a path, without a scheme"),
        ("nosuchfilesystem://x", "nosuchfilesystem:// cannot be read here"),
        (["memory://a.tar", "b.tar"], "files of one file system"),
    ],
)
def test_an_invalid_source_is_refused(tmp_path, monkeypatch, src, message):
    write_pictures(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(src).listing()


def test_brace_expansion():
    assert expand_braces("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{x}.tar") == ["{x}.tar"]


@given(st.lists(st.sampled_from(["a", "a~2", "a~2~2", "b", "a~3"]), max_size=12))
def test_row_14_deduplicated_keys_are_unique_and_the_first_is_unchanged(keys):
    listing = Listing([SourceFile(key, index, 0) for index, key in enumerate(keys)])
    listing.deduplicate_keys()
    found = [file.key for file in listing.files]
    assert len(set(found)) == len(keys)
    assert found == sorted(found)
    assert listing.duplicates == len(keys) - len(set(keys))
    by_row = {file.size: file.key for file in listing.files}
    assert all(by_row[index] == key for index, key in enumerate(keys) if key not in keys[:index])
