"""Parsers of files of others, as functions of bytes, each with valid files for the fuzzer to start with.

Each function catches, by name, the errors that its parser may raise. Any other error is a bug.
"""

import contextlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from data.failures.corpus import EVERY_KIND, SMALL, encoded
from PIL import Image
from safetensors import SafetensorError
from support.small_store import MASK, small_vae, write_store

from fastvae.checkpoints.config import CONFIG_DEFAULTS, read_config_file, validate_config
from fastvae.checkpoints.files import Repository, WeightFiles
from fastvae.checkpoints.tensors import Checkpoint
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.images import formats, jpeg
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.errors import ImageError
from fastvae.data.images.png import damaged_png_chunk
from fastvae.data.images.read import HEADS, image_size, read_image
from fastvae.data.images.tiff import undecodable_tiff
from fastvae.data.sources.open import open_source
from fastvae.data.store.commits import read_commit
from fastvae.data.store.errors import StoreError
from fastvae.data.store.identity import digest
from fastvae.data.store.info import store_facts
from fastvae.data.store.leases import Leases
from fastvae.data.store.mapped_shard import map_shard
from fastvae.data.store.plan import Unit
from fastvae.data.store.shard import read_names
from fastvae.data.store.store import Store

SCRATCH = Path(tempfile.mkdtemp(prefix="fastvae-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
BUCKET, KEYS = (32, 32), ["a.png", "b/ü.png", "c\n.png"]
STORE = write_store(SCRATCH / "store", {BUCKET: KEYS}, logvar="u8", preprocess=MASK)
PLAN, SHARD, RECORD = (
    STORE / "plan" / "units-00000.jsonl",
    STORE / "shards" / "000000-32x32.safetensors",
    STORE / "shards" / "000000-32x32.json",
)
VALID = {path: path.read_bytes() for path in (PLAN, SHARD, RECORD, STORE / "store.json")}
(UNIT,) = Store.open(STORE).units()


@contextlib.contextmanager
def changed(path: Path, data: bytes):
    """Context manager: ``path`` has other bytes."""
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.write_bytes(VALID[path])


def read_store() -> None:
    """Read the store by every function that reads its files."""
    with contextlib.suppress(StoreError):
        store = Store.open(STORE)
        store.commits(with_keys=True)
        store.failures()
        store.columns()
        store_facts(STORE)
    for scaled in (False, True):
        with contextlib.suppress(StoreError):
            rows = LatentDataset(STORE, scaled)
            rows[len(rows) - 1]


def config(data: bytes) -> None:
    """A model's config.json."""
    path = SCRATCH / "config.json"
    path.write_bytes(data)
    for name in CONFIG_DEFAULTS:
        with contextlib.suppress(ValueError):
            validate_config(read_config_file(path), name, "config.json")


def index(data: bytes) -> None:
    """The index of a model's weights in several files, and the headers of the files."""
    from fastvae.checkpoints.files import _read_index

    path = SCRATCH / "index.json"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        Checkpoint(WeightFiles(Repository(str(SCRATCH)), weight_map=_read_index(path), index=path))


def weights(data: bytes) -> None:
    """The header of a model's weights."""
    path = SCRATCH / "weights.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        Checkpoint(WeightFiles(Repository(str(SCRATCH)), single=path)).shapes()


def record(data: bytes) -> None:
    """A commit record."""
    with changed(RECORD, data):
        commit = read_commit(RECORD)
        if commit is not None:
            commit.belongs_to(UNIT)
        read_store()


def plan(data: bytes) -> None:
    """A plan file."""
    with changed(PLAN, data):
        with contextlib.suppress(StoreError):
            assert all(isinstance(unit, Unit) and unit.stem for unit in Store.open(STORE).units())
        read_store()


def facts(data: bytes) -> None:
    """store.json with the right identity digest, which an attacker can compute."""
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        value = json.loads(data)
        value["identity_digest"] = digest(value["identity"])
        data = json.dumps(value).encode()
    with changed(STORE / "store.json", data):
        read_store()


def shard(data: bytes) -> None:
    """A shard: its names, its tensors, and a store that contains it, with the right size in the commit record."""
    fields = json.loads(VALID[RECORD]) | {"bytes": len(data)}
    with changed(SHARD, data), changed(RECORD, json.dumps(fields).encode()):
        with contextlib.suppress(ValueError, TypeError, SafetensorError):
            read_names(SHARD)
        for with_logvar in (False, True):
            with contextlib.suppress(StoreError):
                map_shard(SHARD, (4, 4, 4), with_logvar, with_logvar)
        read_store()


def lease(data: bytes) -> None:
    """Another process's lease."""
    leases = Leases(SCRATCH / "leases")
    leases.folder.mkdir(exist_ok=True)
    (leases.folder / "000001.lease").write_bytes(data)
    leases.live()
    leases.holds("000001")


def _source(data: bytes, name: str) -> None:
    path = SCRATCH / name
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        source = open_source(path)
        for file in source.listing().files[:4]:
            with contextlib.suppress(ImageError):
                source.read(file)


def manifest(data: bytes) -> None:
    """A manifest of images."""
    _source(data, "m.jsonl")


def archive(data: bytes) -> None:
    """A tar shard."""
    _source(data, "a.tar")


def table(data: bytes) -> None:
    """A table of buckets."""
    path = SCRATCH / "table.json"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        Buckets.parse(path, 8)


def structure(data: bytes) -> None:
    """The detection of formats and of cut files, without Pillow."""
    formats.identify(data[:4096])
    formats.describe_refused(data[:64])
    for image_format in HEADS:
        formats.ends_early(image_format, data)
    jpeg.undecodable_jpeg(io.BytesIO(data))
    damaged_png_chunk(data)
    for head in HEADS.values():
        with contextlib.suppress(struct.error, ValueError, KeyError, IndexError):
            head(io.BytesIO(data)).decoded_part(data)
    undecodable_tiff(io.BytesIO(data))


def image(data: bytes) -> None:
    """An image file, read by Pillow and the rules of read_image."""
    for read, options in ((image_size, {}), (read_image, {}), (read_image, {"alpha": "mask"})):
        with contextlib.suppress(ImageError):
            read(data, max_pixels=2**20, **options)


def _archive_seed() -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.png", EVERY_KIND["png"]), ("a.txt", b"words"), ("a.json", b'{"x": 1}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _transparent_seeds() -> list[bytes]:
    levels = SMALL.convert("L")
    kinds = [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
    seeds = [encoded(Image.merge("RGBA", (*SMALL.split(), levels)), kind, **options) for kind, options in kinds]
    seeds += [encoded(Image.merge("LA", (levels, levels)), "PNG"), encoded(levels, "PNG", transparency=9)]
    indexed = SMALL.quantize(16)
    return [
        *seeds,
        encoded(indexed, "PNG", transparency=bytes(range(0, 256, 16))),
        encoded(indexed, "GIF", transparency=3),
    ]


def _config_seed() -> bytes:
    small_vae().save_pretrained(SCRATCH / "vae")
    return (SCRATCH / "vae" / "config.json").read_bytes()


def _failed_record() -> bytes:
    fields = json.loads(VALID[RECORD])
    failed = [{"key": key, "reason": "empty", "detail": "x", "variant": 0} for key in KEYS]
    return json.dumps(fields | {"shard": None, "rows": 0, "bytes": 0, "sha256": None, "failed": failed}).encode()


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "config": (config, [_config_seed()]),
    "index": (index, [json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()]),
    "weights": (weights, [VALID[SHARD]]),
    "record": (record, [VALID[RECORD], _failed_record()]),
    "plan": (plan, [VALID[PLAN]]),
    "facts": (facts, [VALID[STORE / "store.json"]]),
    "shard": (shard, [VALID[SHARD]]),
    "lease": (lease, [json.dumps({"owner": "x", "pid": 1, "host": "y"}).encode()]),
    "manifest": (manifest, [b'{"key": "a", "path": "a.png", "caption": "x"}\n']),
    "archive": (archive, [_archive_seed()]),
    "table": (table, [json.dumps({"sizes": [[64, 64], [32, 128]], "side": 64}).encode()]),
    "structure": (structure, list(EVERY_KIND.values())),
    "image": (image, [*EVERY_KIND.values(), *_transparent_seeds()]),
}
