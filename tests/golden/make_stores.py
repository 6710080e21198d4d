"""Make the stores of format 1 that tests/golden keeps: python tests/golden/make_stores.py NEW_FOLDER

The stores in tests/golden/stores were made by fastvae 0.1.0, commit f7ea018, on 2026-11-30, on a CPU, by torch 2.13.0.
The tests in tests/golden open, resume, verify, repair and export copies of them: every later version must read them as
this build did. They are never made again, and this script refuses a folder that exists. A store of a new rule or a
new format is made by the build that brings the rule, gets a name of its own, and is added beside them.

NAME/source has the images and NAME/store the store. NAME/expected.json has the options of encode, the counts of verify,
and each row as LatentDataset returned it: an array as its type, its shape and the sha256 of its bytes.

    folder    nested folders, a JPEG turned by EXIF, a PNG that is cut; --flip; mean and logvar in fp16
    tar       names with dots, in folders; .txt and .json members; two random crops an image; logvar in u8
    manifest  captions, one of which changed later, and other columns; several buckets; one draw by a seed
    mask      transparency in RGBA and in a palette, stored as masks; the mean alone, in fp32; --hash full
    repaired  an image edited and one added, two damaged units repaired, a failure tried again: three plan files

Three things are changed so that nothing names the machine: commit records have the host "golden", images have fixed
times, and the locks of finished runs (.lock, leases) are deleted. Places are relative to the source.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fastvae

HOST = "golden"
CHANGED = 1_767_225_600  # 2026-01-01 00:00 UTC, when every image was changed
# 1000 bytes a shard, which is two rows of 32x32 with their tables: each store has several shards.
SMALL = {"vae": "tiny", "dtype": "fp32", "device": "cpu", "shard_mb": 0.001, "max_failures": 1}


def pixels(seed: int, width: int, height: int) -> np.ndarray:
    """Return uint8 [H, W, 3], slopes and squares computed in whole numbers: a PNG of them has some 300 bytes."""
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for plane in range(3):
        slope = (x * (1 + (seed + plane) % 4) + y * (1 + (seed * 3 + plane) % 5)) * 2
        squares = (x // (5 + seed % 4) + y // (4 + (seed + plane) % 5)) % 2 * (30 + 9 * (seed % 5))
        planes.append((slope + squares + 37 * seed + 70 * plane) % 256)
    return np.stack(planes, -1).astype(np.uint8)


def encoded(image: Image.Image, suffix: str = ".png", **options: Any) -> bytes:
    """Return the bytes of ``image`` as a PNG or a JPEG."""
    content = io.BytesIO()
    image.save(content, {".png": "PNG", ".jpg": "JPEG"}[suffix], **options)
    return content.getvalue()


def picture(seed: int, width: int = 32, height: int = 32) -> bytes:
    """Return pixels() as a PNG."""
    return encoded(Image.fromarray(pixels(seed, width, height)), optimize=True)


def write(path: Path, content: bytes, changed: int = CHANGED) -> None:
    """Write a file whose time of change is ``changed``, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(changed * 10**9, changed * 10**9))


def make_folder(source: Path, store: Path) -> dict[str, Any]:
    """Make the store "folder"; return the options of encode."""
    write(source / "a.png", picture(0))
    write(source / "b.png", picture(1, 40, 32))
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph = Image.fromarray(pixels(2, 40, 36))
    write(source / "nested" / "deeper" / "c.jpg", encoded(photograph, ".jpg", quality=80, exif=turned.tobytes()))
    write(source / "nested" / "d.png", picture(3, 24, 30))
    write(source / "nested" / "cut.png", picture(4)[:-40])
    options = {**SMALL, "buckets": 32, "flip": True}
    fastvae.encode(source, store, progress=False, deterministic=True, **options)
    return options


def make_tar(source: Path, store: Path) -> dict[str, Any]:
    """Make the store "tar"; return the options of encode."""
    members = {
        "a.b.c.png": picture(10, 40, 32),
        "a.b.c.txt": b"a caption of a.b.c",
        "photos/2026.01/one.v2.png": picture(11, 32, 36),
        "photos/2026.01/one.v2.json": b'{"caption": "one", "tags": ["x", "y"], "score": 0.5}',
        "photos/2026.01/two.v2.png": picture(12, 45, 48),
    }
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), CHANGED
            tar.addfile(member, io.BytesIO(data))
    write(source / "images.tar", content.getvalue())
    options = {**SMALL, "buckets": 32, "crop": "random", "variants": 2, "seed": 2**63 + 2, "logvar": "u8"}
    fastvae.encode(source / "images.tar", store, progress=False, deterministic=True, **options)
    return options


def make_manifest(source: Path, store: Path) -> dict[str, Any]:
    """Make the store "manifest"; return the options of encode."""
    sizes = {"square": (32, 32), "wide": (48, 24), "tall": (20, 48), "panorama": (64, 17)}
    for seed, (name, (width, height)) in enumerate(sizes.items(), 20):
        write(source / "images" / f"{name}.png", picture(seed, width, height))
    options = {**SMALL, "buckets": "sdxl@32", "posterior": "sample", "seed": 11}
    for caption in ("a first caption", "a caption that was changed"):
        lines = [
            {"key": "square", "path": "images/square.png", "caption": caption, "weight": 0.25},
            {"key": "sets/wide.1", "path": "images/wide.png", "caption": "schön \u2603", "tags": ["a", None, 3]},
            {"key": 7, "path": "images/tall.png", "nested": {"source": "generated", "ok": True}},
            {"key": "panorama", "path": "images/panorama.png", "caption": ""},
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write(source / "list.jsonl", text.encode())
        fastvae.encode(source / "list.jsonl", store, progress=False, deterministic=True, **options)
    return options


def make_mask(source: Path, store: Path) -> dict[str, Any]:
    """Make the store "mask"; return the options of encode."""
    for seed, name in enumerate(("hole", "slope", "shrunk"), 30):
        side = 44 if name == "shrunk" else 32
        colours = pixels(seed, side, side)
        y, x = np.mgrid[0:side, 0:side]
        opacity = {
            "hole": ((x - 16) ** 2 + (y - 16) ** 2 > 90) * 255,
            "slope": x * 8,
            "shrunk": (x // 6 + y // 6) % 3 * 127,
        }
        rgba = np.dstack([colours, opacity[name].astype(np.uint8)])
        write(source / f"{name}.png", encoded(Image.fromarray(rgba), optimize=True))
    palette = Image.fromarray(pixels(33, 32, 40)).quantize(8)
    write(source / "palette.png", encoded(palette, transparency=2))
    write(source / "opaque.png", picture(34))
    options = {**SMALL, "buckets": 32, "alpha": "mask", "posterior": "mean", "store_dtype": "fp32", "hash": "full"}
    fastvae.encode(source, store, progress=False, deterministic=True, **options)
    return options


def make_repaired(source: Path, store: Path) -> dict[str, Any]:
    """Make the store "repaired"; return the options of encode."""
    for seed in range(6):
        write(source / f"{seed}.png", picture(40 + seed, 32, 32 + seed))
    write(source / "late.png", b"")
    options = {**SMALL, "buckets": 32}
    fastvae.encode(source, store, progress=False, deterministic=True, **options)
    write(source / "1.png", picture(50, 36, 32), CHANGED + 60)
    write(source / "6.png", picture(51), CHANGED + 60)
    fastvae.encode(source, store, progress=False, deterministic=True, **options)
    shards = sorted((store / "shards").glob("*.safetensors"))
    data = bytearray(shards[1].read_bytes())
    data[-40] ^= 4
    shards[1].write_bytes(data)
    shards[-1].unlink()
    write(source / "late.png", picture(52, 32, 40), CHANGED + 120)
    fastvae.repair(store, source, retry_failed=True, max_failures=1, device="cpu", deterministic=True, progress=False)
    return options


# The source inside NAME/source, where it is not the folder.
SOURCES = {"tar": "images.tar", "manifest": "list.jsonl"}
MAKERS = {
    "folder": make_folder,
    "tar": make_tar,
    "manifest": make_manifest,
    "mask": make_mask,
    "repaired": make_repaired,
}
COUNTS = ("planned", "committed", "rows", "failed", "bytes")


def described(value: Any) -> Any:
    """Return a value of a row as JSON: an array of two or more dimensions by type, shape and sha256."""
    if not hasattr(value, "numpy"):
        return value
    array = value.numpy()
    if array.ndim < 2:
        return array.tolist()
    shape = "x".join(map(str, array.shape))
    return f"{array.dtype} {shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"


def expected_of(store: Path, options: dict[str, Any], source: str) -> str:
    """Return the JSON that the tests compare a store with, a line for each row."""
    plan = [json.loads(line) for path in sorted((store / "plan").iterdir()) for line in path.read_text().splitlines()]
    columns = sorted({name for line in plan for name in line["columns"]})
    found = fastvae.verify(store, deep=True, progress=False)
    assert not found.damaged
    assert not found.stale
    facts = {
        "source": source,
        "options": options,
        "columns": columns,
        "verify": {name: getattr(found, name) for name in COUNTS},
    }
    rows = [
        json.dumps({name: described(value) for name, value in row.items()})
        for row in fastvae.LatentDataset(store, columns=columns, seed=3)
    ]
    return json.dumps(facts, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def main(folder: Path) -> None:
    """Make every store in ``folder``, which must not exist."""
    if folder.exists():
        raise SystemExit(f"{folder} exists: the stores are never made again, name a new folder")
    platform.node = lambda: HOST
    for name, make in MAKERS.items():
        source, store = folder / name / "source", folder / name / "store"
        options = make(source, store)
        shutil.rmtree(store / "leases")
        (store / ".lock").unlink()
        expected = expected_of(store, options, f"source/{SOURCES[name]}" if name in SOURCES else "source")
        (folder / name / "expected.json").write_text(expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
