"""Memory of a long run over large photographs: the pictures that wait for the device are bounded in bytes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_store import picture

ROOT = Path(__file__).parents[3]
READS, FILES, ALLOWED = 10_000, 20, 1.5 * 2**30
SCRIPT = """
import resource, sys
import fastvae
from bench.timing.feed.waiting import waiting_device
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = fastvae.AutoencoderKL.from_pretrained("tiny")
before = peak()
options = {"buckets": 512, "dtype": "fp16", "device": "cpu", "batch": 16, "workers": 8, "progress": False}
with waiting_device(0.1, 0.0, 512):
    report = fastvae.encode(sys.argv[1], sys.argv[2], vae=model, **options)
print(report.ok, peak() - before)
"""


@pytest.mark.slow  # ten minutes of decoding
def test_ten_thousand_reads_of_24_megapixels_stay_under_their_bound(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(FILES):
        tile = np.asarray(picture(number, 600, 400))
        Image.fromarray(np.tile(tile, (10, 10, 1))).save(folder / f"{number}.jpg", quality=90)
    for number in range(FILES, READS):
        os.link(folder / f"{number % FILES}.jpg", folder / f"{number}.jpg")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ok, above = map(int, done.stdout.split())
    sys.stdout.write(f"{above / 2**20:.0f} MiB above the model\n")
    assert ok == READS
    assert above < ALLOWED
