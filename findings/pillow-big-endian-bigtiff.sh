#!/bin/sh
# Pillow 13.0.0: a big-endian BigTIFF, as tifffile 2026.3.3 writes it, is no image.
# Seen: UnidentifiedImageError; the little-endian file of the same array is read.
# Expected: the same pixels from both, since the first bytes of both are in Pillow's list of TIFF's.
# Fails if the file is read.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import PIL
import tifffile
from PIL import Image, TiffImagePlugin

samples = np.arange(16 * 24, dtype=np.uint16).astype(np.uint8).reshape(16, 24)
read = {}
for order in "<>":
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric="minisblack", bigtiff=True, byteorder=order)
    assert file.getvalue()[:4] in TiffImagePlugin.PREFIXES
    try:
        with Image.open(file) as image:
            read[order] = bool((np.asarray(image) == samples).all())
    except PIL.UnidentifiedImageError:
        read[order] = False
print(f"Pillow {PIL.__version__}: little-endian {read['<']}, big-endian {read['>']}")
assert read == {"<": True, ">": False}
PYTHON
