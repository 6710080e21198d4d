#!/bin/sh
# Pillow 13.0.0: resize() of a picture that loses more than twice as many lines as columns has other bytes than in 12.3.0.
# Seen: 30 x 90 to 20 x 40 in LANCZOS differs; its passes are vertical, then horizontal, with a rounding between them.
# Expected: the same bytes, or a line in the release notes, which have none.
# Fails if the bytes are the same, or if 90 x 30 to 40 x 20 has other bytes too.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
for version in 12.3.0 13.0.0; do
    "$folder/venv/bin/python" -m pip install --quiet pillow==$version
    "$folder/venv/bin/python" - "$folder/$version" <<'PYTHON'
import random
import sys

from PIL import Image

noise = bytes(random.Random(0).choices((0, 255), k=90 * 30 * 3))
tall = Image.frombytes("RGB", (30, 90), noise).resize((20, 40), Image.Resampling.LANCZOS)
wide = Image.frombytes("RGB", (90, 30), noise).resize((40, 20), Image.Resampling.LANCZOS)
with open(sys.argv[1], "wb") as file:
    file.write(tall.tobytes() + wide.tobytes())
PYTHON
done
"${PYTHON:-python3}" - "$folder/12.3.0" "$folder/13.0.0" <<'PYTHON'
import sys

before, after = (open(path, "rb").read() for path in sys.argv[1:])
size = len(before) // 2
differ = [sum(a != b for a, b in zip(before[part], after[part])) for part in (slice(size), slice(size, None))]
print(f"bytes of {size} that differ between Pillow 12.3.0 and 13.0.0: {differ[0]} of the tall, {differ[1]} of the wide")
assert differ[0] > 0 == differ[1]
PYTHON
