"""Encode a folder of photographs, kill the run twice, resume it, verify and decode the store, and train on it.

    python -m bench.store.photo_run PHOTOGRAPHS WORK [--vae tiny] [--buckets sdxl@256] [--count 100] [--batch 4]

WORK must not exist; the mixed formats, the store, the contact sheet and result.json stay in it. Every check is an
assertion: the run ends at the first that fails.

1. Every other photograph is converted to another format (mixed_formats.py), the others are copied.
2. `fastvae encode` runs in another process and is killed with SIGKILL twice, when a third and two thirds of the rows
   are committed; the third run completes the store. `fastvae verify --deep` must pass.
3. Each row must have its key, and the bits, size and crop of its image encoded alone into another store.
4. Each row must be nearer than all rows of its bucket to its photograph, opened by Pillow and encoded in fp32 by
   diffusers if --vae is a folder, else by fastvae's model: no two rows are swapped, and no format changed its picture.
5. `fastvae decode --sheet` draws all rows, and the loop of examples/train_loop.py reads one epoch and trains.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import fastvae
from bench.store.mixed_formats import as_seen, photographs_in, write_mixed
from fastvae.report.machine import processor

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.005
LONGEST_OPENED = 2048  # pixels of an original when it is compared
COMPARED = ("mean", "logvar", "original_hw", "crop_tlhw", "bucket", "variant", "sample_id", "noise_key")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--vae", default="tiny", help="a folder, or tiny; 'sd15' has that size and random weights")
    parser.add_argument("--buckets", default="sdxl@256")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--batch", default="4")
    parser.add_argument("--rows-per-shard", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="steps of training, after the epoch that is only read")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True)
    vae = _model(chosen.vae, chosen.work)
    mixed, out = chosen.work / "photographs", chosen.work / "latents"
    made = write_mixed(photographs_in(chosen.photographs, chosen.count), mixed)
    result: dict[str, Any] = {"photographs": len(made), "model": chosen.vae, "buckets": chosen.buckets}
    result |= {"processor": processor(), "threads": torch.get_num_threads()}
    result["forms"] = dict(Counter(form for _, form in made.values()))
    result["pixels"] = _extent(mixed)

    options = ["--vae", vae, "--buckets", chosen.buckets, "--batch", chosen.batch, "--deterministic"]
    options += ["--shard-mb", str(_shard_mb(vae, chosen.buckets, chosen.rows_per_shard))]
    result["runs"] = [_killed(mixed, out, options, len(made) * third // 3) for third in (1, 2)]
    result["runs"].append(_finished(mixed, out, options, len(made)))
    result["rows"] = dict(Counter("x".join(map(str, bucket)) for bucket in _buckets(out)))
    _command("verify", str(out), "--deep")
    print("verify --deep: sound", flush=True)

    result["bits"] = compare_with_single_encodes(mixed, out, vae, options)
    result["nearest"] = compare_with_originals(made, out, vae)
    _command(
        "decode", str(out), str(chosen.work / "decoded"), "--rows", "0:", "--sheet", str(chosen.work / "sheet.png")
    )
    result["training"] = train(out, chosen.steps)
    (chosen.work / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def _model(name: str, work: Path) -> str:
    if name != "sd15":
        return name
    fastvae.AutoencoderKL.from_preset(name, seed=0).save_pretrained(work / "model")
    return str(work / "model")


def _extent(folder: Path) -> str:
    """Return the sizes of the smallest and the largest photograph, and the bytes of all, as text."""
    from fastvae.data.images.read import image_size

    paths = [path for path in folder.rglob("*") if path.is_file()]
    sizes = sorted((image_size(path) for path in paths), key=lambda size: size[0] * size[1])
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    return f"{sizes[0][1]}x{sizes[0][0]} to {sizes[-1][1]}x{sizes[-1][0]}, {megabytes:.0f} MB"


def _shard_mb(vae: str, buckets: str, rows: int) -> float:
    """Return the MB of a shard of ``rows`` rows in the largest bucket."""
    from fastvae.data.images.buckets import Buckets
    from fastvae.data.store.shard import row_bytes

    model = fastvae.AutoencoderKL.from_pretrained(vae, parts=("encoder",))
    sizes = Buckets.parse(buckets, model.downsample_factor).sizes
    area = max(height * width for height, width in sizes) // model.downsample_factor**2
    return rows * row_bytes(int(model.config.latent_channels), area, 1, "fp16", "fp16") / 1e6


def _command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fastvae", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"fastvae {' '.join(words)}: exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def _committed(out: Path) -> int:
    """Return the rows of all commit records."""
    records = (out / "shards").glob("*.json") if (out / "shards").is_dir() else ()
    return sum(json.loads(path.read_text())["rows"] for path in records)


def _killed(source: Path, out: Path, options: list[str], rows: int) -> dict[str, Any]:
    """Start to encode, and kill the process once ``rows`` rows are committed."""
    before, started = _committed(out), time.perf_counter()
    command = [sys.executable, "-m", "fastvae", "encode", str(source), str(out), *options, "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while _committed(out) < rows and process.poll() is None:
        time.sleep(POLL_SECONDS)
    process.kill()
    code, errors = process.wait(), process.communicate()[1]
    assert code == -9, f"encode ended with {code} before {rows} rows were committed: {errors!r}"
    facts = {"killed_at": _committed(out), "found": before, "seconds": round(time.perf_counter() - started, 1)}
    print(facts, flush=True)
    return facts


def _finished(source: Path, out: Path, options: list[str], count: int) -> dict[str, Any]:
    before, children = _committed(out), resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(_command("encode", str(source), str(out), *options, "-q", "--json"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (report["resumed"], report["ok"], report["failed"]) == (before, count - before, 0), report
    names = ("ok", "resumed", "seconds", "decode_seconds", "encode_seconds", "dtype", "dtype_error", "flags")
    facts = {name: report[name] for name in names} | {"images_per_s": round(report["ok"] / report["seconds"], 1)}
    facts["process_cpu_seconds"] = round(after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime, 1)
    print(facts, flush=True)
    return facts


def _buckets(out: Path) -> list[tuple[int, int]]:
    return [bucket for bucket, rows in fastvae.LatentDataset(out).shards() for _ in range(len(rows))]


def compare_with_single_encodes(source: Path, out: Path, vae: str, options: list[str]) -> dict[str, int]:
    """Compare each row, bit for bit, with the only row of a store of its image alone."""
    buckets = options[options.index("--buckets") + 1]
    model = fastvae.AutoencoderKL.from_pretrained(vae)
    rows, alone = fastvae.LatentDataset(out), out.parent / "alone"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert sorted(rows.keys()) == sorted(files), "the keys are not the files"
    values = 0
    for number in range(len(rows)):
        row, key = rows[number], rows.keys()[number]
        target = alone / str(number) / "in" / key
        target.parent.mkdir(parents=True)
        os.link(source / key, target)
        single = alone / str(number) / "out"
        own = {"vae": model, "buckets": buckets, "batch": 1, "deterministic": True, "progress": False}
        fastvae.encode(alone / str(number) / "in", single, **own)
        (other,) = fastvae.LatentDataset(single)
        assert other["key"] == row["key"] == key
        for name in COMPARED:
            assert torch.equal(row[name], other[name]), f"{key}: {name} differs from a store of this image alone"
        values += row["mean"].numel() + row["logvar"].numel()
    print(f"{len(rows)} rows have the bits of their image encoded alone", flush=True)
    return {"rows": len(rows), "values": values, "differing": 0}


@torch.no_grad()
def compare_with_originals(made: dict[str, tuple[Path, str]], out: Path, vae: str) -> dict[str, Any]:
    """Compare each original, opened by Pillow and encoded in fp32, with all rows of its bucket."""
    model: Any = fastvae.AutoencoderKL.from_pretrained(vae)
    if Path(vae).is_dir():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        model = AutoencoderKL.from_pretrained(vae)
    rows = fastvae.LatentDataset(out)
    means = [rows[number]["mean"].float() for number in range(len(rows))]
    own: dict[str, float] = {}
    worst = 0.0
    for number, key in enumerate(rows.keys()):
        bucket = rows[number]["bucket"].tolist()
        x = (
            torch.from_numpy(_covering(as_seen(*made[key], LONGEST_OPENED), *bucket)).permute(2, 0, 1)[None].float()
            / 127.5
            - 1
        )
        expected = model.encode(x).latent_dist.mean[0]
        error = {other: _rms(means[other] - expected) for other in _rows_of(rows, bucket)}
        nearest = min(error, key=error.__getitem__)
        assert nearest == number, f"{key} ({made[key][1]}) is nearer to {rows.keys()[nearest]}: {error}"
        share = error[number] / _rms(expected - expected.mean())
        own[made[key][1]] = max(own.get(made[key][1], 0.0), share)
        others = [value for other, value in error.items() if other != number]
        worst = max(worst, error[number] / min(others)) if others else worst
    print(f"{len(rows)} rows are nearest to their own photograph", flush=True)
    return {
        "rows": len(rows),
        "largest_error_by_form": {form: round(share, 3) for form, share in own.items()},
        "own_over_nearest_other": round(worst, 3),
    }


def _rows_of(rows: fastvae.LatentDataset, bucket: list[int]) -> list[int]:
    return [number for size, numbers in rows.shards() if list(size) == bucket for number in numbers.tolist()]


def _covering(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale a picture to cover the bucket, and crop its centre: uint8 [height, width, 3]."""
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)).copy()


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def train(out: Path, steps: int) -> dict[str, Any]:
    """Read one epoch, each row once; then train the example's denoiser on the stored latents for ``steps`` steps."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train_loop  # type: ignore[import-not-found]

    rows = fastvae.LatentDataset(out, scaled=True)
    epoch = train_loop.stored(rows, torch.device("cpu"), 4, 0, 0)
    seen = Counter(key for batch in epoch(0) for key in batch["key"])
    assert seen == Counter(rows.keys()), "an epoch is not every row once"
    torch.manual_seed(0)
    started = time.perf_counter()
    losses = train_loop.train(train_loop.Denoiser(rows.latent_channels, torch.device("cpu")), epoch, steps)
    first, last = (float(np.mean(part)) for part in (losses[:10], losses[-10:]))
    assert last < first, f"the loss did not fall: {first:.3f} to {last:.3f}"
    per_s = steps / (time.perf_counter() - started)
    return {
        "rows": len(seen),
        "steps": steps,
        "loss": [round(first, 3), round(last, 3)],
        "steps_per_s": round(per_s, 1),
    }


if __name__ == "__main__":
    main()
