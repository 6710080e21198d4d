"""`fastvae encode --json`: its words on files and rows that are refused, left out, flagged or replaced."""

import io
import json
import tarfile
import zlib

import pytest
from data.failures.corpus import SMALL, encoded, png_chunk, swapped_profile
from data.images.test_field_files import IGNORED, LONG_TEXTS, RAW
from PIL import Image
from support.image_parts import with_jpeg_segments, with_png_chunk
from support.small_store import SIDE, picture, write_pictures

LARGE = encoded(picture(0), "PNG")
PACKED = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"x" * 2_000_000))
HALF = with_jpeg_segments(b"ICC_PROFILE\0" + bytes([1, 2]) + swapped_profile()[:300])
FILES = {
    "photograph.png": LARGE,
    "lossless.jpg": b"\xff\xd8\xff\xf7\0\x0b" + bytes(9),
    "raw.dng": RAW["dng, gpr"],
    "raw.cr3": RAW["cr3"],
    "text.png": with_png_chunk(*LONG_TEXTS["zTXt"], image=picture(0)),
    "profile unpacks.png": with_png_chunk(PACKED, image=picture(0)),
    "profile empty.png": with_png_chunk(png_chunk(b"iCCP", b""), image=picture(0)),
    "profile cut.jpg": HALF,
    "small.png": encoded(SMALL, "PNG"),
    "transparent.png": encoded(Image.new("RGBA", (40, 40)), "PNG"),
    "transparent.bmp": IGNORED["all_transparent, 32-bit BMP"],
    "pq.png": IGNORED["ignored_cicp"],
    "gamma.png": IGNORED["ignored_gamma"],
    "photograph-masklabel.png": LARGE,
    "photograph.mask.png": LARGE,
    "@eaDir/photograph.png": LARGE,
}
OPTIONS = ("--buckets", SIDE, "--dtype", "fp32", "--device", "cpu", "--json", "--quiet")


@pytest.fixture
def say(forks, model):
    """Run `fastvae encode --json` and return its document."""

    def run(*arguments, code=0):
        done = forks.fastvae("encode", *arguments, "--vae", model, *OPTIONS)
        assert done.returncode == code, done.stderr
        document = json.loads(done.stdout)
        if code:
            assert done.stderr == f"fastvae: {document['error']}\n"
        return document

    return run


def write_files(folder):
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def archive(path, *names, number=0):
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = encoded(picture(number), "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_files_that_are_refused_flagged_or_passed_over(say, tmp_path):
    found = say(write_files(tmp_path / "in"), tmp_path / "out", "--exclude", "*-masklabel*")
    assert (found["ok"], found["failed"], found["reasons"]) == (11, 3, {"unsupported": 3})
    assert [line.split()[1] for line in found["failures"]] == ["lossless.jpg", "raw.cr3", "raw.dng"]
    flags = {"all_transparent": 2, "broken_profile": 3, "ignored_cicp": 1, "ignored_gamma": 1, "upscaled": 5}
    assert found["flags"] == flags
    assert (found["excluded"], found["masks"], found["passed_over"]) == (1, {"*.mask*": 1}, {"@eaDir": 1})


@pytest.mark.parametrize(
    ("rule", "reason"), [(["--no-upscale"], "below_bucket"), (["--min-size", SIDE], "below_min_size")]
)
def test_images_left_out_for_their_size(say, tmp_path, rule, reason):
    source = write_files(tmp_path / "in")
    assert say(source, tmp_path / "out", *rule)["reasons"] == {reason: 5, "unsupported": 3}
    planned = say(source, tmp_path / "planned", *rule, "--dry-run")
    assert (planned["reasons"], planned["unreadable_headers"]) == ({reason: 5}, 3)


def test_rows_replaced_gone_pruned_and_kept_apart(say, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_pictures(folder, 2)
    assert say(*folders, tmp_path / "out")["duplicate_keys"] == 2
    picture(9).save(folders[0] / "000.png")
    (folders[1] / "001.png").unlink()
    found = say(*folders, tmp_path / "out")
    assert (found["ok"], found["resumed"]) == (1, 3)
    assert (found["replaced"], found["replaced_keys"]) == (1, ["000.png"])
    assert (found["gone"], found["gone_keys"], found["pruned"]) == (1, ["001.png~2"], 0)
    found = say(*folders, tmp_path / "out", "--prune")
    assert (found["gone_keys"], found["pruned"], found["resumed"]) == (["001.png~2"], 1, 3)


def test_a_refused_source_is_one_document_too(say, tmp_path):
    several = archive(tmp_path / "several.tar", "1.image.png", "1.depth.png")
    found = say(several, tmp_path / "out", code=2)
    assert found == {
        "error": "several.tar: 1 has 2 images: image_column must be one of image.png, depth.png",
        "exit_code": 2,
    }
    assert say(several, tmp_path / "out", "--image-column", "image.png")["ok"] == 1
    archive(tmp_path / "000.tar", "1.png"), archive(tmp_path / "001.tar", "1.png", number=1)
    assert say(tmp_path / "000.tar", tmp_path / "second")["ok"] == 1
    found = say(tmp_path / "001.tar", tmp_path / "second", code=2)
    assert found["exit_code"] == 2
    assert "from 000.tar, and 001.tar has another image of that key" in found["error"]


def test_captions_that_have_no_image_are_noted(say, tmp_path):
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\nbroken\n')
    notes = say(tmp_path / "in", tmp_path / "out")["notes"]
    assert notes[0] == "1 captions are of files that are not among the images"
    assert notes[1].startswith("1 captions of metadata.jsonl have no file_name or are no JSON")
