#!/bin/sh
# Pillow refuses a sound PNG if one compressed text in it unpacks to more than 1 MiB, although the text is no part of the
# picture. Image generators write their workflow as such a text.
exec "${PYTHON:-python3}" - <<'PYTHON'
import io
import struct
import zlib

import PIL
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


print(f"Pillow {PIL.__version__}")
written = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(written, "PNG")
png = written.getvalue()
for size in (1_000_000, 2_000_000):
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * size))
    try:
        with Image.open(io.BytesIO(png[:33] + text + png[33:])) as image:
            image.load()
        print(f"text of {size:,} bytes: read")
    except ValueError as error:
        print(f"text of {size:,} bytes: {type(error).__name__}: {error}")
PYTHON
