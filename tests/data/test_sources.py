"""What counts as an image of a folder, in which order, and that odd folders end."""

import os

import pytest
from small_store import picture, write_pictures

from fastvae.data.sources import list_folder


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


def test_odd_names_survive(tmp_path):
    names = ["new\nline.png", "ünï 😀.png", "-rf.png", os.fsdecode(b"not utf-8 \xff.png")]
    for name in names:
        picture(0).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", tmp_path / name)
    assert sorted(keys(tmp_path)) == sorted(names)


def test_links_are_followed_once_and_loops_end(tmp_path, monkeypatch):
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
