#!/bin/sh
# libavif 1.4.2 (in Pillow 13.0.0) and 1.4.0 (in imagecodecs 2026.3.6): an AVIF of 12 bits in 4:2:0 has other colours in
# 8 bits than in 16, if its width is odd. So do those of 10 bits and in 4:2:2, and any width in 4:2:0 with opacity.
# Seen: Pillow's 8 bits differ from imagecodecs' 16 bits, rounded to 8, by 3 levels in a width of 32 and by 19 in 33.
# Expected: the same in both, as for an AVIF of 8 bits, where none differs.
# Fails if the odd width has no larger difference, or an AVIF of 8 bits has one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0 imagecodecs==2026.3.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import imagecodecs
import numpy as np
import PIL
from PIL import Image

levels = {}
for bits, width in ((8, 32), (8, 33), (12, 32), (12, 33)):
    y, x = np.mgrid[:32, :width]
    waves = np.sin(np.stack([0.6 * x + 0.2 * y, 0.2 * x + 0.6 * y + 2, 0.4 * x - 0.4 * y + 4], -1))
    most = 2**bits - 1
    samples = ((0.5 + 0.4 * waves) * most).round().astype(np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.avif_encode(samples, level=90, pixelformat="420", bitspersample=bits)
    rounded = (imagecodecs.avif_decode(data) / most * 255).round()
    with Image.open(io.BytesIO(data)) as image:
        levels[bits, width] = int(np.abs(np.asarray(image) - rounded).max())
print(f"Pillow {PIL.__version__}, imagecodecs {imagecodecs.__version__}: largest difference by bits and width: {levels}")
assert levels[8, 32] == levels[8, 33] == 0 < levels[12, 32] < levels[12, 33]
PYTHON
