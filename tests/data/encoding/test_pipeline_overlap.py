"""Hashing and writing in parallel with an encoder that waits as a GPU does: the encoder is never idle for them."""

import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from support.small_store import SIDE, small_vae, write_pictures

import fastvae.data.encoding.run
import fastvae.system.atomic_files
from fastvae.data.encoding.encode import encode

ROWS, BATCH, SECONDS = 96, 8, 0.08
LATENT = (8, 128, 128)  # SDXL's moments: 256 KiB a row in the store
SHARD_MB = 0.0074  # 16 rows, by the latents of the small model that the run is given
# Idle time that is allowed, as a share of the time of the writes.
IDLE, TRIES = 0.3, 6


class WaitingDevice:
    """A fake MomentEncoder of a GPU: a batch takes ``SECONDS`` of the device's time and none of the CPU's.

    ``idle``: seconds without work after the first batch.
    """

    device, dtype, widest, deterministic = torch.device("cuda"), torch.float32, 8, False
    model = reference = torch.nn.Identity()

    def __init__(self, *_):
        self.free_at, self.idle, self.batches = None, 0.0, 0

    def start(self, pixels):
        now = time.perf_counter()
        if self.free_at is not None:
            self.idle += max(0.0, now - self.free_at)
        self.free_at = done_at = max(now, self.free_at or 0.0) + SECONDS
        self.batches += 1
        # Every row differs.
        moments = np.random.default_rng(self.batches).normal(size=(len(pixels), *LATENT)).astype(np.float32)

        def result():
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return moments, 0

        return SimpleNamespace(result=result)

    def error_against_fp32(self, pixels):
        return None


def held_up(folder, device, monkeypatch) -> float:
    """Encode to a slow disk, which takes 0.8 of the device's time for a shard; return the seconds of writing."""
    real, written = fastvae.system.atomic_files.os.fsync, []

    def slow(descriptor):
        size = fastvae.system.atomic_files.os.fstat(descriptor).st_size
        if size > 2**20:
            written.append(size)
            time.sleep(0.8 * SECONDS * 16 / BATCH)
        real(descriptor)

    options = {"buckets": SIDE, "dtype": "fp32", "device": "cpu", "batch": BATCH, "workers": 2, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(fastvae.data.encoding.run, "MomentEncoder", lambda *_: device)
        patch.setattr(fastvae.system.atomic_files.os, "fsync", slow)
        report = encode(folder / "in", folder / "out", vae=small_vae(), shard_mb=SHARD_MB, **options)
    assert report.ok == ROWS
    assert len(written) == ROWS / 16
    return report.write_seconds


def test_hashing_and_writing_hold_no_encoder_up(tmp_path, monkeypatch):
    """If they did, the device would be idle as long as they take. The best of a few runs: a core must be free."""
    write_pictures(tmp_path / "in", ROWS)
    shares = []
    while len(shares) < TRIES and min(shares, default=1) > IDLE:
        device = WaitingDevice()
        writing = held_up(tmp_path, device, monkeypatch)
        shutil.rmtree(tmp_path / "out")
        assert writing > 0.7 * ROWS / BATCH * SECONDS
        shares.append(device.idle / writing)
        sys.stdout.write(f"idle {device.idle:.3f} s beside {writing:.2f} s of writing\n")
    assert min(shares) <= IDLE
