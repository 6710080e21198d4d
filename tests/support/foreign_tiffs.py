"""Random TIFFs by tifffile and OpenCV, and as the second reader tifffile's or OpenCV's own pixels."""

import io
import random

import numpy as np
import tifffile
from support.foreign_pixels import (
    HAS_IMAGECODECS,
    HAS_OPENCV,
    Case,
    bgr,
    cmyk_to_rgb,
    eight_bit,
    over_white,
    profile_of,
    rgb_of,
    smooth,
    to_srgb,
    upright,
)

if HAS_OPENCV:
    import cv2


def tiff(rng: random.Random) -> Case:
    """A TIFF of tifffile: depth, colours, planes, extra samples, tiles, compression, byte order, orientation."""
    photometric = rng.choice(["minisblack", "miniswhite", "rgb", "rgb", "separated", "palette"])
    deep, extra = rng.random() < 0.5, rng.choice([None, None, "unassalpha", "assocalpha", "unspecified"])
    if photometric == "palette":
        deep, extra = False, None
    if photometric == "minisblack" and extra is None and rng.random() < 0.3:
        return packed_tiff(rng)
    colours = {"rgb": 3, "separated": 4}.get(photometric, 1)
    samples = smooth(rng, colours + (extra is not None), deep)
    if extra == "assocalpha":
        samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
    separate = samples.shape[-1] > 1 and rng.random() < 0.5
    codecs = [None, None, "deflate"] + ["lzw", "packbits", "zstd", "lzma"] * HAS_IMAGECODECS
    if photometric == "rgb" and not deep and extra is None and HAS_IMAGECODECS:
        codecs.append("jpeg")
    options = {
        "photometric": photometric,
        "planarconfig": "separate" if separate else "contig",
        "extrasamples": [extra] if extra else None,
        "compression": rng.choice(codecs),
        "tile": rng.choice([None, None, (16, 16), (32, 16)]),
        "bigtiff": rng.random() < 0.2,
        "orientation": rng.choice([1, 1, 1, *range(1, 9)]),
        "deep": deep,
    }
    options["byteorder"] = ">" if options["compression"] is None and rng.random() < 0.3 else "<"
    options["predictor"] = bool(options["compression"] in ("deflate", "lzw") and HAS_IMAGECODECS and rng.random() < 0.4)
    options["rowsperstrip"] = None if options["tile"] else rng.choice([None, 7, 16])
    profile = None
    if photometric in ("rgb", "minisblack") and not deep and extra is None and HAS_IMAGECODECS and rng.random() < 0.3:
        profile = profile_of(photometric == "minisblack")
    options["profile"], options["pages"] = profile is not None, rng.choice([1, 1, 1, 2])
    file = io.BytesIO()
    own = ("orientation", "deep", "predictor", "profile", "pages")
    given = {name: value for name, value in options.items() if name not in own}
    if samples.shape[-1] == 1:
        given.pop("planarconfig")
    palette = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)
    stored = samples[..., 0] if samples.shape[-1] == 1 else np.moveaxis(samples, -1, 0) if separate else samples
    with tifffile.TiffWriter(file, bigtiff=given.pop("bigtiff"), byteorder=given.pop("byteorder")) as writer:
        for number in range(options["pages"]):
            writer.write(
                np.ascontiguousarray(stored[..., ::-1] if number else stored),
                **given,
                metadata=None,
                predictor=options["predictor"],
                iccprofile=profile,
                colormap=palette if photometric == "palette" else None,
                extratags=[(274, 3, 1, options["orientation"], True)],
            )
    data = file.getvalue()
    read = tifffile.imread(io.BytesIO(data), key=0)
    read = np.moveaxis(read, 0, -1) if separate else read.reshape(samples.shape)
    rgb = _tiff_rgb(read, photometric, extra, palette)
    if profile is not None:
        rgb = to_srgb(rgb, profile, photometric == "minisblack")
    return Case("TIFF", options, data, upright(rgb, options["orientation"]))


def packed_tiff(rng: random.Random) -> Case:
    """A grey TIFF of 1, 4 or 12 bits a sample."""
    bits = rng.choice([1, 4, 12] if HAS_IMAGECODECS else [1])
    samples = smooth(rng, 1, True)[..., 0] >> (16 - bits)
    stored = samples.astype(bool) if bits == 1 else samples if bits == 12 else samples.astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, stored, photometric="minisblack", bitspersample=bits)
    read = tifffile.imread(io.BytesIO(file.getvalue())).astype(np.uint16)
    levels = (read / (2**bits - 1) * 255).round().astype(np.uint8)
    return Case("TIFF", {"bits": bits}, file.getvalue(), rgb_of(levels))


def _tiff_rgb(read: np.ndarray, photometric: str, extra: str | None, palette: np.ndarray) -> np.ndarray:
    if photometric == "palette":
        return (palette >> 8).astype(np.uint8).T[read[..., 0]]
    colours = read[..., :-1] if extra else read
    if photometric == "miniswhite":
        colours = np.iinfo(read.dtype).max - colours
    rgb = cmyk_to_rgb(colours) if photometric == "separated" else rgb_of(colours)
    if extra in (None, "unspecified"):
        return rgb
    opacity = eight_bit(read[..., -1])
    if extra == "assocalpha":  # colours are multiplied by the opacity already
        return np.clip(rgb.astype(int) + 255 - opacity[..., None], 0, 255).astype(np.uint8)
    return over_white(rgb, opacity)


def opencv_tiff(rng: random.Random) -> Case:
    """A TIFF of OpenCV, which has its own copy of libtiff."""
    channels, deep = rng.choice([1, 3, 4]), rng.random() < 0.5
    samples = smooth(rng, channels, deep)
    compression = rng.choice([1, 5, 8, 32773])
    data = bytes(cv2.imencode(".tiff", bgr(samples), [cv2.IMWRITE_TIFF_COMPRESSION, compression])[1])
    options = {"channels": channels, "deep": deep, "compression": compression}
    return Case(
        "TIFF of OpenCV", options, data, rgb_of(bgr(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)))
    )


def foreign_tiff(rng: random.Random) -> Case:
    """A TIFF whose samples have no known white level, which is refused."""
    name = rng.choice(["int8", "int16", "uint64", "float16", "float32", "float64"])
    grey = rng.random() < 0.5
    file = io.BytesIO()
    samples = smooth(rng, 1 if grey else 3, False).astype(name)
    if not grey and rng.random() < 0.5:
        samples = np.moveaxis(samples, -1, 0)
    separate = "separate" if samples.shape[0] == 3 else "contig"
    options = {} if grey else {"planarconfig": separate}
    tifffile.imwrite(file, samples[..., 0] if grey else samples, photometric="minisblack" if grey else "rgb", **options)
    return Case(f"refused: {name}", options, file.getvalue(), None)
