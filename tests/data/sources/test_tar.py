"""Tar archives: every row gets its own member, in any order, and from damaged or hostile archives."""

import io
import os
import random
import re
import tarfile
from dataclasses import replace

import pytest
from data.sources.numbered_images import png, seeds_of
from PIL import Image
from support.small_store import picture

from fastvae.data.images.errors import ImageError
from fastvae.data.sources.open import open_source

wds = pytest.importorskip("webdataset", reason="webdataset, whose writer is tested, is not installed")


def archive(path, members, **options):
    """Write ``members``, (name or TarInfo, bytes), in this order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def rows(source, **options):
    return {file.key: file for file in source.listing(**options).files}


def test_shards_of_webdatasets_writer_keep_their_captions(tmp_path):
    with wds.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=3, verbose=0) as writer:
        for seed in range(7):
            sample = {"__key__": f"dir/{seed:04d}", "png": picture(seed, 24, 16), "cls": seed, "json": {"n": [seed]}}
            writer.write(sample | {"txt": f"caption {seed}\n ü"})
    for src in (
        str(tmp_path / "part-{000..002}.tar"),
        str(tmp_path / "part-*.tar"),
        [tmp_path / f"part-{number:03d}.tar" for number in (0, 1, 2)],
    ):
        source = open_source(src)
        listing = source.listing()
        assert [file.key for file in listing.files] == [f"dir/{seed:04d}" for seed in range(7)]
        assert listing.files[6].place.startswith("part-002.tar@")
        assert seeds_of(source, listing.files) == {f"dir/{seed:04d}": seed for seed in range(7)}
        for seed, file in enumerate(listing.files):
            assert file.columns == {"txt": f"caption {seed}\n ü", "cls": seed, "json": {"n": [seed]}}
        assert (listing.duplicates, listing.ignored, listing.unreadable, listing.notes) == (0, 0, [], [])
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".tar")]


def test_members_in_any_order_get_their_own_columns(tmp_path):
    members = [(f"{seed}.png", png(seed)) for seed in range(6)] + [(f"{seed}.txt", b"%d" % seed) for seed in range(6)]
    random.Random(0).shuffle(members)
    source = open_source(archive(tmp_path / "a.tar", members))
    files = source.listing().files
    assert seeds_of(source, files) == {str(seed): seed for seed in range(6)}
    assert {file.key: file.columns for file in files} == {str(seed): {"txt": str(seed)} for seed in range(6)}


def test_row_14_duplicates_keep_their_own_images_and_captions(tmp_path):
    first = [("a.png", png(0)), ("a.txt", b"0"), ("a.png", png(1)), ("a.txt", b"1"), ("a~2.png", png(2))]
    archive(tmp_path / "1.tar", first)
    archive(
        tmp_path / "2.tar", [("a.png", png(3)), ("a.txt", b"3"), ("b.png", png(4)), ("b.jpg", png(5)), ("b.txt", b"4")]
    )
    source = open_source([tmp_path / "1.tar", tmp_path / "2.tar"], tar_rule="last dot")
    listing = source.listing()
    assert listing.duplicates == 3
    assert seeds_of(source, listing.files) == {"a": 0, "a~3": 1, "a~2": 2, "a~4": 3, "b": 4, "b~2": 5}
    captions = {file.key: file.columns.get("txt") for file in listing.files}
    assert captions == {"a": "0", "a~3": "1", "a~2": None, "a~4": "3", "b": "4", "b~2": "4"}


def test_names_with_several_dots_are_samples_of_webdataset(tmp_path):
    members = [
        ("0001.image.jpg", png(0)), ("0001.caption.txt", b"first"), ("0001.json", b'{"n": 1}'),
        ("v1.2/b.IMAGE.PNG", png(1)), ("v1.2/b.caption.txt", b"second"), ("v1.2/b.x.y.cls", b"7"),
        ("no dot", png(2)), ("c.png", png(3)), ("c.txt", b"third"),
    ]  # fmt: skip
    path = archive(tmp_path / "a.tar", members)
    source = open_source(path)
    files = source.listing().files
    assert seeds_of(source, files) == {"0001": 0, "v1.2/b": 1, "no dot": 2, "c": 3}
    columns = {file.key: dict(file.columns) for file in files}
    assert columns["0001"] == {"caption.txt": "first", "json": {"n": 1}}
    assert columns["v1.2/b"] == {"caption.txt": "second", "x.y.cls": 7}
    theirs = [sample["__key__"] for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)]
    assert {*theirs} == {*columns} - {"no dot"}  # webdataset leaves out names without a dot


def test_several_images_in_a_sample_need_the_name_of_one(tmp_path):
    members = [("a.image.jpg", png(0)), ("a.mask.png", png(1)), ("a.txt", b"a"), ("b.image.jpg", png(2))]
    path = archive(tmp_path / "a.tar", members)
    choices = "a.tar: a has 2 images: image_column must be one of image.jpg, mask.png"
    with pytest.raises(ValueError, match=choices):
        open_source(path).listing()
    for name in ("image", "image.jpg", "IMAGE.jpg"):
        source = open_source(path, image_column=name)
        listing = source.listing()
        assert seeds_of(source, listing.files) == {"a": 0, "b": 2}
        assert (listing.ignored, listing.notes) == (1, [])
    source = open_source(path, image_column="mask")
    listing = source.listing()
    assert seeds_of(source, listing.files) == {"a": 1}
    assert listing.notes == ["1 members of samples without an image 'mask' are left out"]
    with pytest.raises(
        ValueError, match=r"there is none in .*; 4 members of samples without an image 'depth' are left out"
    ):
        open_source(path, image_column="depth").listing()
    with pytest.raises(ValueError, match="image_column must be one of png, jpg"):
        open_source(archive(tmp_path / "b.tar", [("a.png", png(0)), ("a.jpg", png(1))])).listing()


def test_names_end_at_their_last_dot_under_the_rule_of_earlier_versions(tmp_path):
    members = [("a.b.c.png", png(0)), ("a.b.c.txt", b"abc"), ("a.png", png(1)), ("a.jpg", png(2))]
    source = open_source(archive(tmp_path / "a.tar", members), tar_rule="last dot")
    files = source.listing().files
    assert seeds_of(source, files) == {"a.b.c": 0, "a": 1, "a~2": 2}
    assert [dict(file.columns) for file in files] == [{}, {"txt": "abc"}, {}]


def test_ambiguous_repeats_of_a_stem_have_no_columns(tmp_path):
    members = [("a.png", png(0)), ("a.png", png(1)), ("a.txt", b"whose?"), ("a.txt", b"and this?")]
    listing = open_source(archive(tmp_path / "a.tar", members)).listing()
    assert [file.columns for file in listing.files] == [{}, {}]
    assert "no clear order" in listing.notes[0]


def test_invalid_columns_are_left_out_and_named(tmp_path):
    members = [("a.png", png(0)), ("a.json", b'{"x": NaN}'), ("a.txt", b"x" * (2**20 + 1)), ("a.cls", b"cat")]
    members += [("b.png", png(1)), ("b.txt", b"\xff\xfa"), ("orphan.txt", b"no image"), ("readme", b"words")]
    listing = open_source(archive(tmp_path / "a.tar", members)).listing()
    assert [file.columns for file in listing.files] == [{"cls": "cat"}, {"txt": os.fsdecode(b"\xff\xfa")}]
    assert listing.ignored == 2
    assert listing.notes == [
        "1 members larger than 1048576 bytes are left out of the columns",
        "1 members that are no JSON are left out of the columns",
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_in_every_tar_format(tmp_path, format):
    long = "f" * 90 + "/" + "n" * 80 if format == tarfile.USTAR_FORMAT else "f" * 300 + "/ü😀" + "n" * 200
    members = [("plain.png", png(0)), (f"{long}.png", png(1)), ("no suffix", png(2)), ("new\nline.PNG", png(3))]
    source = open_source(archive(tmp_path / "a.tar", members, format=format))
    assert seeds_of(source, source.listing().files) == {"plain": 0, long: 1, "no suffix": 2, "new\nline": 3}


def test_a_sparse_member_is_not_read_and_is_named(tmp_path):
    """Its stored bytes are not the image that tar unpacks."""
    image = Image.new("RGB", (512, 512))
    image.paste((200, 40, 90), (0, 0, 512, 8))
    image.save(tmp_path / "holes.bmp")
    data = (tmp_path / "holes.bmp").read_bytes()
    with open(tmp_path / "sparse.bmp", "wb") as file:  # a bitmap starts with its bottom row: zeros, a hole
        file.write(data[:512])
        file.seek(len(data) - 16384)
        file.write(data[-16384:])
    (tmp_path / "plain.png").write_bytes(png(0))
    note = "1 members stored without their holes (tar --sparse) are not read"
    for style in ("gnu", "pax"):
        path = tmp_path / f"{style}.tar"
        command = ["tar", "-C", str(tmp_path), f"--format={style}", "-Scf", str(path)]
        if os.spawnlp(os.P_WAIT, "tar", *command, "sparse.bmp", "plain.png"):
            pytest.skip("this system's tar writes no sparse members")
        assert path.stat().st_size < 64 * 1024
        source = open_source(path)
        listing = source.listing()
        assert seeds_of(source, listing.files) == {"plain": 0}
        assert (listing.ignored, listing.notes) == (1, [note])
        if not os.spawnlp(os.P_WAIT, "tar", *command, "sparse.bmp"):
            with pytest.raises(ValueError, match=re.escape(note)):
                open_source(path).listing()


# Damage


def bytes_or_reason(source, file):
    try:
        return source.read(file)
    except ImageError as error:
        return error.reason


def test_every_cut_of_a_tar_is_reported(tmp_path):
    members = [(f"{seed}.{kind}", png(seed) if kind == "png" else b"c") for seed in range(4) for kind in ("png", "txt")]
    complete = archive(tmp_path / "complete.tar", members).read_bytes()
    places = open_source(tmp_path / "complete.tar").listing().files
    ends = {file.key: sum(map(int, file.place.split("@")[1].split("+"))) for file in places}
    mark = 512 * (complete.rstrip(b"\0").__len__() // 512 + 1)
    path = tmp_path / "cut.tar"
    for cut in [*range(512, mark + 512, 256), *(end - 1 for end in ends.values())]:
        path.write_bytes(complete[:cut])
        source = open_source(path)
        listing = source.listing()
        assert listing.unreadable, cut
        assert listing.unreadable[0].startswith("cut.tar: it "), cut
        assert all(file.columns in ({}, {"txt": "c"}) for file in listing.files), cut
        found = {file.key: bytes_or_reason(source, file) for file in listing.files}
        expected = {str(seed): png(seed) if ends[str(seed)] <= cut else "truncated" for seed in range(4)}
        assert found == {key: expected[key] for key in found}, cut
        assert {key for key, value in expected.items() if value != "truncated"} <= set(found), cut
    path.write_bytes(complete[: mark + 512])
    assert open_source(path).listing().unreadable == []
    path.write_bytes(complete + complete)
    assert "goes on behind its end mark after 4 images" in open_source(path).listing().unreadable[0]


def test_a_changed_archive_is_refused(tmp_path):
    path = archive(tmp_path / "a.tar", [("a.png", png(0)), ("b.png", png(1))])
    source = open_source(path)
    listed = rows(source)
    archive(path, [("b.png", png(1)), ("a.png", png(0))])
    os.utime(path, ns=(0, listed["a"].mtime_ns + 1))
    with pytest.raises(ImageError, match=r"a\.tar was changed since it was listed") as caught:
        source.read(listed["a"])
    assert caught.value.reason == "unreadable"
    assert rows(source)["a"] != listed["a"]
    path.unlink()
    with pytest.raises(ImageError, match="a cannot be read: No such file"):
        source.read(listed["a"])


def test_flipped_header_bytes_raise_only_known_errors(tmp_path):
    options = {"format": tarfile.PAX_FORMAT}
    members = [(f"{seed}ü.png" if seed % 2 else f"{seed}.png", png(seed)) for seed in range(4)]
    complete = archive(tmp_path / "a.tar", members, **options).read_bytes()
    generator, images = random.Random(0), {png(seed) for seed in range(4)}
    headers = [at for at in range(0, len(complete), 512) if complete[at + 257 : at + 262] == b"ustar"]
    read = 0
    for _ in range(150):
        damaged = bytearray(complete)
        at = generator.choice(headers)
        damaged[at + generator.choice((0, 124, 126, 130, 135, 156, 345, 512, 515))] = generator.randrange(256)
        block = damaged[at : at + 512]
        block[148:156] = b" " * 8
        damaged[at + 148 : at + 156] = b"%06o\0 " % sum(block)  # the right checksum of the changed header
        (tmp_path / "damaged.tar").write_bytes(damaged)
        try:
            source = open_source(tmp_path / "damaged.tar")
            files = source.listing().files
        except ValueError as error:
            if "there is none in" not in str(error):
                raise
            continue
        read += sum(bytes_or_reason(source, file) in images for file in files)
    assert read > 200


# Hostile archives


def test_row_13_hostile_members_write_no_files(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    members = []
    for number in range(40):
        for name in (f"../../up{number}.png", f"/absolute/{number}.png", f"./a/../b{number}.png"):
            members.append((name, png(number % 12)))
        link = tarfile.TarInfo(f"link{number}.png")
        link.type, link.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 2], "/etc/passwd"
        device = tarfile.TarInfo(f"device{number}.png")
        device.type = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)[number % 4]
        members += [(link, b""), (device, b"")]
    path = archive(inside / "hostile.tar", members)
    source = open_source(path)
    listing = source.listing()
    assert len(members) == 200
    assert len(listing.files) == 120
    assert listing.ignored == 70  # links and devices; ten folders are not counted
    assert seeds_of(source, listing.files)["/absolute/7"] == 7
    assert "../../up3" in {file.key for file in listing.files}
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(inside) == ["hostile.tar"]


def test_row_13_a_name_with_a_nul_in_its_extended_header_is_a_key(tmp_path):
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {"path": "nul\0inside.png"}
    source = open_source(archive(tmp_path / "a.tar", [(info, png(5))], format=tarfile.PAX_FORMAT))
    assert seeds_of(source, source.listing().files) == {"nul\0inside": 5}


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**62, 2**50, 10**9, -(2**40)])
def test_a_member_size_beyond_the_archive_allocates_nothing(tmp_path, size, kind):
    header = tarfile.TarInfo("huge.png")
    header.size, header.type = size, kind
    block = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(
        archive(tmp_path / "b.tar", [("ok.png", png(0))]).read_bytes()[:1536] + block + bytes(4096)
    )
    source = open_source(tmp_path / "a.tar")
    listing = source.listing()
    assert listing.unreadable or listing.ignored
    assert source.read(next(file for file in listing.files if file.key == "ok")) == png(0)
    for file in listing.files:
        if file.key == "huge":
            with pytest.raises(ImageError) as caught:
                source.read(file)
            assert caught.value.reason in ("too_large", "truncated")


def test_a_negative_member_size_ends_the_listing(tmp_path):
    complete = archive(tmp_path / "b.tar", [("a.png", png(0)), ("b.png", png(1))]).read_bytes()
    second, end = complete.index(b"b.png"), 512 * (len(complete.rstrip(b"\0")) // 512 + 1)
    header = tarfile.TarInfo("back.png")
    header.size = second - (end + 512)
    (tmp_path / "a.tar").write_bytes(complete[:end] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    source = open_source(tmp_path / "a.tar")
    listing = source.listing()
    assert seeds_of(source, listing.files) == {"a": 0, "b": 1}
    assert listing.unreadable == ["a.tar: it is cut or damaged after 2 images"]


def test_a_member_beyond_the_pixel_limit_is_not_read(tmp_path):
    source = open_source(archive(tmp_path / "a.tar", [("a.png", png(0))]))
    (file,) = source.listing().files
    huge = replace(file, size=2**26 + 8001)
    with pytest.raises(ImageError, match="more than 1000 pixels can need"):
        source.read(huge, max_pixels=1000)
    with pytest.raises(ImageError, match="ends beyond the end"):
        source.read(huge, max_pixels=1001)


# Refused archives


def test_an_unusable_archive_is_refused(tmp_path):
    archive(tmp_path / "words.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match=r"there is none in .*1 other members passed over"):
        open_source(tmp_path / "words.tar").listing()
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"; cannot be read: empty\.tar: it is cut or damaged after 0 images"):
        open_source(tmp_path / "empty.tar").listing()
    with pytest.raises(ValueError, match=r"src names missing\.tar, which cannot be read: No such file"):
        open_source(tmp_path / "missing.tar").listing()
    with pytest.raises(ValueError, match="compressed as a whole"):
        open_source(tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "really gz.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="compressed as a whole: its members cannot be found by seek"):
        open_source(tmp_path / "really gz.tar").listing()
    with pytest.raises(ValueError, match="src must match a file"):
        open_source(tmp_path / "no-*.tar")
    for backwards in ("{9..1}", "{0..99999999}"):
        with pytest.raises(ValueError, match="src must count up"):
            open_source(f"{tmp_path}/{backwards}.tar")
