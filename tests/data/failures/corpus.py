"""Generated bad inputs that a run must refuse or survive; real encoders make the real files."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image, ImageCms
from support.small_store import picture

from fastvae.data.images.read import LARGEST_ASPECT

# Images


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    """Return ``image`` as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """Return a PNG of these filtered ``rows``, of any number, which Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def dimension_bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """Return a file of less than a kilobyte whose header says 400 megapixels."""
    return png(width, height, 8, 2, bytes(900))


def other_bombs() -> dict[str, bytes]:
    """Return bombs in other formats: real files whose header is changed to 30,000 x 30,000."""
    small = picture(0, 16, 16)
    gif, bmp, jpeg = (bytearray(encoded(small, name)) for name in ("GIF", "BMP", "JPEG"))
    struct.pack_into("<HH", gif, 6, 30_000, 30_000)
    struct.pack_into("<ii", bmp, 18, 30_000, 30_000)
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 30_000, 30_000)
    tiff = bytearray(encoded(small, "TIFF"))
    for tag in (256, 257):  # width and length, each the one number of its entry
        place = next(at for kind in (3, 4) if (at := tiff.find(struct.pack("<HHI", tag, kind, 1))) >= 0)
        struct.pack_into("<HII", tiff, place + 2, 4, 1, 30_000)
    return {"gif": bytes(gif), "bmp": bytes(bmp), "jpeg": bytes(jpeg), "tiff": bytes(tiff)}


SMALL = picture(1, 24, 16)
EVERY_KIND = {
    "jpeg": encoded(SMALL, "JPEG"),
    "progressive jpeg": encoded(SMALL, "JPEG", progressive=True),
    "cmyk jpeg": encoded(SMALL.convert("CMYK"), "JPEG"),
    "png": encoded(SMALL, "PNG"),
    "grey png": encoded(SMALL.convert("L"), "PNG"),
    "webp": encoded(SMALL, "WEBP"),
    "lossless webp": encoded(SMALL, "WEBP", lossless=True),
    "bmp": encoded(SMALL, "BMP"),
    "tiff": encoded(SMALL, "TIFF"),
    "lzw tiff": encoded(SMALL, "TIFF", compression="tiff_lzw"),
    "deflate tiff": encoded(SMALL, "TIFF", compression="tiff_deflate"),
    "gif": encoded(SMALL, "GIF"),
    "avif": encoded(SMALL, "AVIF"),
}

REFUSED = {
    "zero bytes": (b"", "empty"),
    "text": (b"this is a caption, not a picture", "unsupported"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported"),
    "pdf": (b"%PDF-1.7\n", "unsupported"),
    "fits": (b"SIMPLE  =                    T" + b" " * 50, "unsupported"),
    "text that starts like a bitmap": (b"BMW is a maker of cars, and this is text about it", "unsupported"),
    "garbage after the JPEG marker": (b"\xff\xd8\xff" + b"\x13garbage" * 40, "decode_error"),
    "noise after a JPEG's first segment marker": (b"\xff\xd8\xff\xe0" + bytes(range(1, 251)) * 2, "decode_error"),
    "a side of one pixel": (encoded(Image.new("RGB", (4096, 1)), "PNG"), "too_small"),
    "thinner than any bucket": (encoded(Image.new("RGB", (8 * LARGEST_ASPECT + 1, 8)), "PNG"), "too_thin"),
    "floats": (encoded(Image.new("F", (32, 32)), "TIFF"), "unsupported"),
    "32-bit integers": (encoded(Image.new("I", (32, 32), 70_000), "TIFF"), "unsupported"),
}


def bad_images() -> list[tuple[bytes, str]]:
    """Return bytes and their reason of quarantine: everything above, cut files, flipped checksums, bombs."""
    cases = [(data, reason) for data, reason in REFUSED.values()]
    cases += [(data[: len(data) // 2], "truncated") for data in EVERY_KIND.values()]
    cases += [(dimension_bomb(), "too_large")] + [(bomb, "too_large") for bomb in other_bombs().values()]
    flipped = bytearray(EVERY_KIND["png"])
    flipped[flipped.index(b"IDAT") + 40] ^= 1
    return [*cases, (bytes(flipped), "decode_error")]


def write_bad_images(folder: Path, count: int) -> dict[str, str]:
    """Write ``count`` bad files, all kinds in turn, all named .jpg; return their reasons by key."""
    kinds, reasons = bad_images(), {}
    for number in range(count):
        data, reason = kinds[number % len(kinds)]
        key = f"bad {number:03d}.jpg"
        (folder / key).write_bytes(data)
        reasons[key] = reason
    return reasons


def swapped_profile() -> bytes:
    """Return sRGB with its red and blue primaries exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    data[red + 4 : red + 8], data[blue + 4 : blue + 8] = data[blue + 4 : blue + 8], data[red + 4 : red + 8]
    return bytes(data)


# Names

HOSTILE_NAMES = (
    "../../up.png",
    "..",
    ".png",
    "/etc/passwd.png",
    "a\nb.png",
    "a\rb.png",
    "\x1b[2J\x1b[31mred.png",
    "\x1b]0;title\x07.png",
    "\x9b31m.png",
    "right\u202eto left.png",
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "$(touch pwned).png",
    "; rm -rf ..png",
    "-rf.png",
    "con.png",
    "x" * 200 + ".png",
    os.fsdecode(b"not utf-8 \xff.png"),
    "ünï 😀.png",
    "%s%n{0}.png",
)


def hostile_tar(path: Path, members: int = 200) -> int:
    """Write a tar of names that lead out of it, links, devices and folders; return the number of image members."""
    image, images = EVERY_KIND["png"], 0
    with tarfile.open(path, "w") as tar:
        for number in range(members):
            info = tarfile.TarInfo(("../../up%d.png", "/absolute%d.png", "./a/../../b%d.png")[number % 3] % number)
            kind = number % 5
            if kind < 3:
                info.size, images = len(image), images + 1
            elif kind == 3:
                info.type, info.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 2], "../../../etc/passwd"
            else:
                kinds = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
                info.type = kinds[number // 5 % len(kinds)]
            tar.addfile(info, io.BytesIO(image) if kind < 3 else None)
    return images


# Weights and shards


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file of this header, valid or not."""
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    """Return the part of a header for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def hostile_safetensors() -> dict[str, bytes]:
    """Return small files with a false header, by the false field."""

    def file(tensors: object, data: bytes = b"") -> bytes:
        return safetensors_bytes(json.dumps(tensors).encode(), data)

    return {
        "no header": b"",
        "seven bytes": b"\0" * 7,
        "a header of 8 EiB": struct.pack("<Q", 2**63 - 1) + b"{}",
        "a header of 99 MB that is not there": struct.pack("<Q", 99_000_000) + b"{}",
        "a header of 40 MB": safetensors_bytes(b'{"__metadata__": {"x": "' + b"y" * 40_000_000 + b'"}}'),
        "a header nested too deep": safetensors_bytes(b"[" * 100_000),
        "overlapping tensors": file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "offsets backwards": file({"a": entry("F32", [1], 4, 0)}, bytes(4)),
        "offsets past the end": file({"a": entry("F32", [2**20], 0, 2**22)}, bytes(4)),
        "a shape of 2^120": file({"a": entry("F32", [2**60, 2**60], 0, 4)}, bytes(4)),
        "a shape whose product wraps round": file({"a": entry("F16", [2**63, 2], 0, 0)}),
        "a negative shape": file({"a": entry("F32", [-1], 0, 4)}, bytes(4)),
        "no dimensions": file({"mean": entry("F16", [], 0, 2)}, bytes(2)),
        "a dtype that there is not": file({"a": entry("F99", [1], 0, 4)}, bytes(4)),
        "a hole between tensors": file({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 3, 4)}, bytes(4)),
        "bytes after the last tensor": file({"a": entry("U8", [1], 0, 1)}, bytes(9)),
        "a list": file([]),
    }


def hostile_configs() -> dict[str, dict[str, object]]:
    """Return changes of a config.json that would cost memory or time, or crash, if they were not refused."""
    return {
        "a thousand million channels": {"block_out_channels": [10**9] * 4},
        "no channels": {"block_out_channels": [0, 0, 0, 0]},
        "channels that are no number": {"block_out_channels": ["64", None, [], {}]},
        "a million blocks": {"block_out_channels": [8] * 10**6, "down_block_types": ["DownEncoderBlock2D"] * 10**6},
        "negative groups": {"norm_num_groups": -4},
        "no groups": {"norm_num_groups": 0},
        "a million million layers": {"layers_per_block": 10**12},
        "layers without end": {"layers_per_block": 10**400},
        "wide and deep": {"block_out_channels": [65_536] * 4, "layers_per_block": 64},
        "a latent as wide as memory": {"latent_channels": 2**62},
        "no sample": {"sample_size": 0},
        "an infinite scale": {"scaling_factor": float("inf")},
        "no scale": {"scaling_factor": 0},
        "code for an activation": {"act_fn": "__import__('os').system('touch pwned')"},
        "a block from elsewhere": {"down_block_types": ["os.system"] * 4},
        "a megabyte of text": {"act_fn": "x" * 2**20},
    }
