#!/bin/sh
# Pillow 13.0.0: an uncompressed TIFF of 16 bits with one plane for each colour, as tifffile 2026.3.3 writes an array
# [3, H, W], opens without an error and has other colours.
# Seen: every pixel written as 234, 117, 3 (of 255); pixels read from 96, 48, 3 to 234, 117, 232.
# Expected: the colours that were written, or an error.
# Fails if the planes are read rightly or refused.
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
from PIL import Image

planes = np.empty((3, 16, 16), np.uint16)
planes[:] = np.array([60000, 30000, 1000], np.uint16)[:, None, None]
file = io.BytesIO()
tifffile.imwrite(file, planes, photometric="rgb")
with Image.open(file) as image:
    found = np.asarray(image.convert("RGB")).reshape(-1, 3)
wanted = (planes[:, 0, 0] >> 8).tolist()
print(f"Pillow {PIL.__version__}: written {wanted}, read {found.min(0).tolist()} to {found.max(0).tolist()}")
assert (np.abs(found.astype(int) - wanted) > 16).any()
PYTHON
