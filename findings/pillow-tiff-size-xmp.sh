#!/bin/sh
# Pillow 13.0.0: a TIFF whose orientation is in XMP alone changes its size when it is loaded.
# Seen: 40 x 24 after Image.open, 24 x 40 after load().
# Expected: one size. A TIFF with the orientation tag has the rotated size as soon as it is opened.
# Fails if the size is the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io

import PIL
from PIL import Image

XMP, ORIENTATION = 700, 274
sizes = {}
for name, tags in {"tag": {ORIENTATION: 6}, "xmp": {XMP: b'<rdf:Description tiff:Orientation="6"/>'}}.items():
    file = io.BytesIO()
    Image.new("RGB", (40, 24)).save(file, "TIFF", tiffinfo=tags)
    with Image.open(file) as image:
        opened = image.size
        image.load()
        sizes[name] = opened, image.size
print(f"Pillow {PIL.__version__}: opened and loaded {sizes}")
assert sizes == {"tag": ((24, 40), (24, 40)), "xmp": ((40, 24), (24, 40))}
PYTHON
