#!/bin/sh
# Pillow opens an uncompressed TIFF of 16 bits with a plane for each colour, and returns other colours, without an error.
# Needs Pillow, numpy and tifffile.
exec "${PYTHON:-python3}" - <<'PYTHON'
import io

import numpy as np
import PIL
import tifffile
from PIL import Image

print(f"Pillow {PIL.__version__}, tifffile {tifffile.__version__}")
planes = np.empty((3, 16, 16), np.uint16)
planes[:] = np.array([60000, 30000, 1000], np.uint16)[:, None, None]
for name, options in (("planes", {"data": planes}), ("interleaved", {"data": planes.transpose(1, 2, 0).copy()})):
    file = io.BytesIO()
    tifffile.imwrite(file, photometric="rgb", **options)
    try:
        with Image.open(file) as image:
            found = np.asarray(image.convert("RGB")).reshape(-1, 3)
        print(f"{name:12} written {(planes[:, 0, 0] >> 8).tolist()}, read {found.min(0).tolist()} to {found.max(0).tolist()}")
    except (OSError, ValueError) as error:
        print(f"{name:12} {type(error).__name__}: {error}")
PYTHON
