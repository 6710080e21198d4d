#!/bin/sh
# Pillow 13.0.0: a sound PNG is refused if one compressed text in it unpacks to more than 1 MiB, although the text is no
# part of the picture. Programs that generate images write their settings as such a text.
# Seen: a zTXt chunk of 1,000,000 bytes of text: read; of 2,000,000: ValueError "Decompressed data too large ...".
# Expected: the pixels are read, and the text is left out or cut.
# Fails if the second file is read, or the first is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import zlib

import PIL
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


written = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(written, "PNG")
png = written.getvalue()
seen = {}
for size in (1_000_000, 2_000_000):
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * size))
    try:
        with Image.open(io.BytesIO(png[:33] + text + png[33:])) as image:
            image.load()
        seen[size] = "read"
    except ValueError as error:
        seen[size] = f"ValueError: {error}"
    print(f"Pillow {PIL.__version__}, text of {size:,} bytes: {seen[size]}")
assert seen[1_000_000] == "read"
assert "too large" in seen[2_000_000]
PYTHON
