"""Random valid images by the encoders of tifffile, imagecodecs and OpenCV, read by fastvae and by a second reader.

Run as a script: FIRST and COUNT on the command line, one JSON line a case on stdout. Each case runs in a forked child,
because a decoder may end its process; such a death is reported by the format's name, and its bytes are not kept.
"""

import json
import os
import random
import sys
import traceback
from collections.abc import Callable

import numpy as np
from support.foreign_formats import avif, bmp, foreign, gif, jpeg, png, webp
from support.foreign_pixels import HAS_IMAGECODECS, HAS_OPENCV, Case
from support.foreign_tiffs import foreign_tiff, opencv_tiff, tiff


def makers() -> list[Callable[[random.Random], Case]]:
    """Return the makers whose libraries are installed."""
    found = [tiff, tiff, tiff, tiff, foreign_tiff]
    found += [png, png, jpeg, jpeg, bmp, gif] if HAS_IMAGECODECS or HAS_OPENCV else []
    found += [webp, avif, foreign] if HAS_IMAGECODECS else []
    return found + [opencv_tiff] * HAS_OPENCV


def judge(case: Case) -> dict:
    """Return the result of a case: "same", "refused" with its reason, or "different" with its levels."""
    from fastvae.data.images.errors import ImageError
    from fastvae.data.images.read import image_size, read_image

    try:
        picture = read_image(case.data)
        pixels = np.asarray(picture.image)
        sizes = {picture.original_hw, image_size(case.data), pixels.shape[:2]}
    except ImageError as error:
        return {"result": "refused", "reason": error.reason}
    if case.expected is None or len(sizes) > 1 or pixels.shape != case.expected.shape:
        return {"result": "different", "levels": 256, "shape": list(pixels.shape)}
    difference = np.abs(pixels.astype(int) - case.expected.astype(int))
    levels, mean = int(difference.max()), float(difference.mean())
    return {"result": "same" if levels <= 1 else "different", "levels": levels, "mean": round(mean, 3)}


def run(seed: int) -> dict:
    """Return the result of one case, made and read in a child; "died" names no more than the format."""
    rng = random.Random(seed)
    choices = makers()
    make = choices[seed % len(choices)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            case = make(rng)
            os.write(writer, json.dumps({"kind": case.kind}).encode() + b"\n")
            found = {"kind": case.kind, **judge(case), "options": case.options}
            os.write(writer, json.dumps(found, default=str).encode() + b"\n")
        except BaseException:  # noqa: BLE001 (a forked child must never return from here)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        lines = pipe.read().splitlines()
    status = os.waitpid(child, 0)[1]
    if status == 0:
        return {"seed": seed, **json.loads(lines[-1])}
    # Before the first line the encoder ended it, which is no matter of fastvae's.
    kind = json.loads(lines[0])["kind"] if lines else make.__name__
    died = "died" if os.WIFSIGNALED(status) else "error"
    return {"kind": kind, "result": died if lines else f"encoder {died}", "seed": seed if died == "error" else None}


if __name__ == "__main__":
    import PIL.Image
    import PIL.ImageCms

    import fastvae.data.images.read  # noqa: F401 (all once, before the forks)

    PIL.Image.init()

    assert "torch" not in sys.modules
    first, count = map(int, sys.argv[1:])
    for number in range(first, first + count):
        sys.stdout.write(json.dumps(run(number)) + "\n")
        sys.stdout.flush()
