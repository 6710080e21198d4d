"""JSONL manifests: images by key and path; a URL only if its scheme is allowed."""

import json
import os

import pytest
from data.sources.numbered_images import png, seeds_of

from fastvae.data.images.errors import ImageError
from fastvae.data.sources.open import open_source


def manifest(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_manifest_names_files_by_relative_and_absolute_paths(tmp_path):
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


def test_relative_paths_start_at_each_manifests_folder(tmp_path):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x.png").write_bytes(png(number))
        manifest(tmp_path / str(number) / "m.jsonl", [{"key": f"from {number}", "path": "x.png"}])
    for src in ([tmp_path / "0" / "m.jsonl", tmp_path / "1" / "m.jsonl"], f"{tmp_path}/*/m.jsonl"):
        source = open_source(src)
        assert seeds_of(source, source.listing().files) == {"from 0": 0, "from 1": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "a", "path": "file:///etc/passwd"}', "m.jsonl line 2: file:// is not allowed, write the path alone"),
        ('{"key": "a", "path": "FILE://x"}', "file:// is not allowed, write"),
        (
            '{"key": "a", "uri": "https://x/y.png"}',
            "m.jsonl line 2: https:// is not allowed unless schemes contains 'https'",
        ),
        ('{"key": "a", "uri": "s3://x/y.png"}', "s3:// is not allowed unless"),
        ('{"key": "a"}', "image or path or uri or file_name must name an image's file"),
        ('{"key": "a", "path": ""}', "must name an image's file"),
        ('{"key": "a", "path": "nul\\u0000.png"}', "must name an image's file"),
        ('{"key": 1.5, "path": "a.png"}', "m.jsonl line 2: key must be text or an integer, got 1.5"),
        ('{"key": "", "path": "a.png"}', "m.jsonl line 2: key must be text or an integer, got ''"),
        ('{"key": "\\ud800", "path": "a.png"}', "half a surrogate pair"),
        ('{"key": "a", "path": "a.png", "score": NaN}', "line 2 is no JSON: NaN is no JSON"),
        ('["a", "b"]', "line 2 must be an object"),
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
    ],
)
def test_an_invalid_line_is_refused_by_its_number(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_text('{"key": "ok", "path": "ok.png"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "m.jsonl").listing()


def test_a_line_without_a_key_has_its_path_as_the_key(tmp_path):
    entries = [{"path": "sub/a.png", "text": "one"}, {"file_name": "b.png"}, {"key": None, "uri": "/c/d.png"}]
    entries += [{"key": "k", "path": "b.png"}, {"photo": "e.png"}, {"path": "b.png"}]
    source = open_source(manifest(tmp_path / "m.jsonl", entries), image_column="photo")
    files = source.listing().files
    assert [(file.key, file.place) for file in files] == [
        ("/c/d.png", "/c/d.png"),
        ("b.png", "b.png"),
        ("b.png~2", "b.png"),
        ("e.png", "e.png"),
        ("k", "b.png"),
        ("sub/a.png", "sub/a.png"),
    ]
    assert files[-1].columns == {"text": "one"}
    with pytest.raises(ValueError, match=r"m\.jsonl line 1: name must be text or an integer, got None"):
        open_source(tmp_path / "m.jsonl", image_column="photo", key_column="name").listing()


def test_an_empty_or_missing_manifest_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="src must hold rows"):
        open_source(tmp_path / "m.jsonl").listing()
    with pytest.raises(ValueError, match=r"src names n\.jsonl, which cannot be read"):
        open_source(tmp_path / "n.jsonl").listing()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_named_by_a_manifest_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(manifest(tmp_path / "m.jsonl", [{"key": "a", "path": "pipe.png"}]))
    (file,) = source.listing().files
    with pytest.raises(ImageError, match="Not a regular file"):
        source.read(file)
