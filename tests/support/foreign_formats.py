"""Random JPEGs, PNGs, WebPs, AVIFs, BMPs and GIFs by imagecodecs and OpenCV, and the pixels that these read."""

import random
import struct
import zlib

import numpy as np
from support.foreign_pixels import (
    HAS_IMAGECODECS,
    HAS_OPENCV,
    Case,
    bgr,
    cmyk_to_rgb,
    profile_of,
    rgb_of,
    smooth,
    to_srgb,
    upright,
)

if HAS_IMAGECODECS:
    import imagecodecs
if HAS_OPENCV:
    import cv2


def libraries() -> list[str]:
    """Return the libraries that are installed."""
    return ["imagecodecs"] * HAS_IMAGECODECS + ["cv2"] * HAS_OPENCV


def exif_of(orientation: int) -> bytes:
    """Return an EXIF block of an orientation."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def opencv(data: bytes) -> np.ndarray:
    """Return the samples that OpenCV reads, not rotated."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)


def png(rng: random.Random) -> Case:
    """A PNG: 1, 8 or 16 bits, 1 to 4 channels, animated, with a profile, an orientation before or after the pixels."""
    library, channels, deep = rng.choice(libraries()), rng.choice([1, 2, 3, 4]), rng.random() < 0.5
    kind = rng.choice(["bilevel" if library == "cv2" else "animated", *["plain"] * 4])
    if kind == "bilevel":
        channels, deep = 1, False
    channels = 3 if channels == 2 and library == "cv2" else channels
    samples = smooth(rng, channels, deep)
    samples = samples[..., 0] if channels == 1 else samples
    if library == "cv2":
        flags = [cv2.IMWRITE_PNG_COMPRESSION, rng.randrange(10), cv2.IMWRITE_PNG_FILTER, rng.choice([0, 8, 16, 32, 64])]
        flags += [cv2.IMWRITE_PNG_BILEVEL, 1] if kind == "bilevel" else []
        data = bytes(cv2.imencode(".png", bgr(samples), flags)[1])
        read = bgr(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    elif kind == "animated":
        data = bytes(imagecodecs.apng_encode(np.stack([samples, samples[::-1]])))
        read = imagecodecs.apng_decode(data)[0]
    else:
        data = bytes(imagecodecs.png_encode(samples, level=rng.randrange(10)))
        read = imagecodecs.png_decode(data)
    orientation, profile = rng.choice([1, 1, 1, *range(1, 9)]), None
    if HAS_IMAGECODECS and channels in (1, 3) and not deep and rng.random() < 0.3:
        profile = profile_of(channels == 1)
        data = with_chunk(data, b"iCCP", b"a profile\0\0" + zlib.compress(profile), 33)
    late = rng.random() < 0.3
    data = with_chunk(data, b"eXIf", exif_of(orientation), len(data) - 12 if late else 33)
    rgb = rgb_of(read) if profile is None else to_srgb(rgb_of(read), profile, channels == 1)
    options = {"library": library, "channels": channels, "deep": deep, "kind": kind, "orientation": orientation}
    return Case("PNG", {**options, "profile": profile is not None, "late": late}, data, upright(rgb, orientation))


def with_chunk(data: bytes, name: bytes, body: bytes, place: int) -> bytes:
    """Return a PNG with a chunk at ``place``."""
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:place] + chunk + data[place:]


def jpeg(rng: random.Random) -> Case:
    """A JPEG: grey, RGB or CMYK, every subsampling, progressive, lossless, with restarts, profile and orientation."""
    if HAS_IMAGECODECS and rng.random() < 0.15:
        return cmyk_jpeg(rng)
    library, channels, quality = rng.choice(libraries()), rng.choice([1, 3, 3]), rng.choice([30, 75, 95, 100])
    samples = smooth(rng, channels, False)
    options = {"library": library, "channels": channels, "orientation": rng.choice([1, 1, *range(1, 9)])}
    if library == "cv2":
        sampling = [0x111111, 0x211111, 0x221111, 0x411111, 0x121111]
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, rng.randrange(2)]
        flags += [cv2.IMWRITE_JPEG_RST_INTERVAL, rng.choice([0, 1, 5])]
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, rng.choice(sampling)]
        data = bytes(cv2.imencode(".jpg", bgr(samples), flags)[1])
    else:
        options["lossless"] = rng.random() < 0.15
        options["subsampling"] = rng.choice(["444", "422", "420", "411", "440"]) if channels == 3 else None
        options["space"] = rng.choice(["YCBCR", "RGB"]) if channels == 3 else None
        options["optimize"] = rng.random() < 0.5
        sampled = options["space"] == "YCBCR" and not options["lossless"]
        data = bytes(
            imagecodecs.jpeg8_encode(
                samples if channels > 1 else samples[..., 0],
                level=None if options["lossless"] else quality,
                lossless=options["lossless"],
                outcolorspace=None if options["lossless"] else options["space"],
                subsampling=options["subsampling"] if sampled else None,
                optimize=options["optimize"] and not options["lossless"],
            )
        )
    rgb = rgb_of(imagecodecs.jpeg8_decode(data) if HAS_IMAGECODECS else bgr(opencv(data)))
    options["chunks"] = rng.choice([0, 0, 1, 3]) if HAS_IMAGECODECS else 0
    if options["chunks"]:
        profile = profile_of(channels == 1)
        data, rgb = with_profile(data, profile, options["chunks"], rng), to_srgb(rgb, profile, channels == 1)
    data = with_segment(data, 0xE1, b"Exif\0\0" + exif_of(options["orientation"]))
    return Case("JPEG", options, data, upright(rgb, options["orientation"]))


def cmyk_jpeg(rng: random.Random) -> Case:
    """A CMYK JPEG with Adobe's marker, whose inks are stored inverted."""
    samples = smooth(rng, 4, False)
    data = bytes(imagecodecs.jpeg8_encode(255 - samples, level=95, colorspace="CMYK", outcolorspace="CMYK"))
    return Case("JPEG", {"cmyk": True}, data, cmyk_to_rgb(255 - imagecodecs.jpeg8_decode(data)))


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """Return a JPEG with a segment after its first marker."""
    return data[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + data[2:]


def with_profile(data: bytes, profile: bytes, chunks: int, rng: random.Random) -> bytes:
    """Return a JPEG with a profile in so many chunks, in any order."""
    step = -(-len(profile) // chunks)
    parts = [(number + 1, profile[number * step : (number + 1) * step]) for number in range(chunks)]
    for number, part in rng.sample(parts, chunks):
        data = with_segment(data, 0xE2, b"ICC_PROFILE\0" + bytes((number, chunks)) + part)
    return data


def webp(rng: random.Random) -> Case:
    """A WebP, lossless or not, with opacity or without, simple or extended by a profile or an orientation."""
    library, lossless, channels = rng.choice(libraries()), rng.random() < 0.5, rng.choice([3, 4])
    samples = smooth(rng, channels, False)
    if library == "cv2":
        flags = [cv2.IMWRITE_WEBP_QUALITY, 101 if lossless else rng.choice([30, 75, 95])]
        data = bytes(cv2.imencode(".webp", bgr(samples), flags)[1])
    else:
        data = bytes(imagecodecs.webp_encode(samples, level=rng.choice([30, 75, 95]), lossless=lossless))
    rgb = rgb_of(imagecodecs.webp_decode(data))
    orientation, profile = rng.choice([1, 1, *range(1, 9)]), None
    if channels == 3 and rng.random() < 0.3:
        profile = profile_of(False)
        rgb = to_srgb(rgb, profile, False)
    options = {"library": library, "lossless": lossless, "channels": channels, "orientation": orientation}
    if orientation > 1 or profile is not None:
        data = extended_webp(data, samples, orientation, profile)
    return Case("WEBP", {**options, "profile": profile is not None}, data, upright(rgb, orientation))


def extended_webp(data: bytes, samples: np.ndarray, orientation: int, profile: bytes | None) -> bytes:
    """Return a WebP with a head that announces EXIF and a profile, and these."""
    old = data[12:]
    if old[:4] == b"VP8X":
        old = old[8 + struct.unpack_from("<I", old, 4)[0] :]
    flags = 0x08 | 0x20 * (profile is not None) | 0x10 * (samples.shape[-1] == 4)
    size = b"".join(struct.pack("<I", side - 1)[:3] for side in samples.shape[1::-1])
    body = riff(b"VP8X", bytes((flags, 0, 0, 0)) + size)
    body += b"" if profile is None else riff(b"ICCP", profile)
    body += old + riff(b"EXIF", exif_of(orientation))
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def riff(name: bytes, body: bytes) -> bytes:
    """Return a chunk of a RIFF file."""
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def avif(rng: random.Random) -> Case:
    """An AVIF of 8, 10 or 12 bits, with opacity or without, in every subsampling.

    Colours of more than 8 bits are compared with OpenCV's in 8 bits: there libavif shifts the planes first, and of odd
    widths it fills in chroma by another filter than in 16 bits.
    """
    channels, sampling, bits = rng.choice([3, 4]), rng.choice(["444", "422", "420"]), rng.choice([8, 8, 10, 12])
    bits = bits if HAS_OPENCV and cv2.haveImageWriter(".avif") else 8
    samples = smooth(rng, channels, bits > 8) >> (16 - bits if bits > 8 else 0)
    options = {"channels": channels, "sampling": sampling, "bits": bits}
    level = rng.choice([60, 90])
    data = bytes(imagecodecs.avif_encode(samples, level=level, pixelformat=sampling, bitspersample=bits))
    read = imagecodecs.avif_decode(data)
    if bits == 8:
        return Case("AVIF", options, data, rgb_of(read))
    colours = bgr(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    opacity = (read[..., 3:] / (2**bits - 1) * 255).round().astype(np.uint8)
    return Case("AVIF", options, data, rgb_of(np.concatenate([colours, opacity], -1)))


def bmp(rng: random.Random) -> Case:
    """A BMP of OpenCV or imagecodecs."""
    library = rng.choice(libraries())
    channels = rng.choice([1, 3, 4] if library == "cv2" else [1, 3])
    samples = smooth(rng, channels, False)
    if library == "cv2":
        data = bytes(cv2.imencode(".bmp", bgr(samples))[1])
        read = bgr(opencv(data))
    else:
        data = bytes(imagecodecs.bmp_encode(samples if channels > 1 else samples[..., 0]))
        read = imagecodecs.bmp_decode(data)
    return Case("BMP", {"library": library, "channels": channels}, data, rgb_of(read))


def gif(rng: random.Random) -> Case:
    """A GIF, of one frame or two."""
    library, frames = rng.choice(libraries()), rng.choice([1, 1, 2])
    samples = smooth(rng, 3 if library == "cv2" else 1, False)
    if library == "cv2":
        data = bytes(cv2.imencode(".gif", bgr(samples))[1])
        read = bgr(opencv(data))
    else:
        data = bytes(imagecodecs.gif_encode(np.stack([samples[..., 0], samples[::-1, ..., 0]][:frames])))
        read = imagecodecs.gif_decode(data, index=0)
    return Case("GIF", {"library": library, "frames": frames}, data, rgb_of(read))


def foreign(rng: random.Random) -> Case:
    """An image of a format that is refused."""
    name = rng.choice(["jpegxl", "jpeg2k", "qoi", "jpegxr"])
    return Case(f"refused: {name}", {}, bytes(getattr(imagecodecs, f"{name}_encode")(smooth(rng, 3, False))), None)
