"""Every parser of ours that reads what others may have written, as a function of bytes.

Each raises nothing: what a parser may raise is caught here by name, and anything else is a fault. ``seeds`` holds whole
files of each kind, from which a fuzzer starts.
"""

import contextlib
import json
import os
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
from fastvae.data.images import formats as signatures
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import PLUGINS, image_size, read_image
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
WHOLE = {path: path.read_bytes() for path in (PLAN, SHARD, RECORD, STORE / "store.json")}
(UNIT,) = Store.open(STORE).units()


@contextlib.contextmanager
def changed(path: Path, data: bytes):
    """``path`` with other bytes for a while."""
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.write_bytes(WHOLE[path])


def read_store() -> None:
    """All that reading a store does with its files."""
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
    """The index of weights in several files, and the files' headers."""
    from fastvae.checkpoints.files import _read_index

    path = SCRATCH / "index.json"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        Checkpoint(WeightFiles(Repository(str(SCRATCH)), weight_map=_read_index(path), index=path))


def weights(data: bytes) -> None:
    """A model's weights, as far as their shapes."""
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
    """store.json, with the digest that its identity has: whoever writes one can compute it."""
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        value = json.loads(data)
        value["identity_digest"] = digest(value["identity"])
        data = json.dumps(value).encode()
    with changed(STORE / "store.json", data):
        read_store()


def shard(data: bytes) -> None:
    """A shard: its names, its tensors, and a store that has it, with a record that believes its size."""
    told = json.loads(WHOLE[RECORD]) | {"bytes": len(data)}
    with changed(SHARD, data), changed(RECORD, json.dumps(told).encode()):
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
        Buckets.named(path, 8)


def structure(data: bytes) -> None:
    """What tells formats and cut files apart: ours alone, before Pillow sees a byte."""
    signatures.identify(data[:4096])
    signatures.describe_refused(data[:64])
    for image_format in PLUGINS:
        signatures.ends_early(image_format, data)
    signatures.damaged_png_chunk(data)


def image(data: bytes) -> None:
    """An image file through Pillow and the rules around it."""
    for read, options in ((image_size, {}), (read_image, {}), (read_image, {"alpha": "mask"})):
        with contextlib.suppress(ImageError):
            read(data, max_pixels=2**20, **options)


def _archive_seed() -> bytes:
    import io
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
    told = json.loads(WHOLE[RECORD])
    failed = [{"key": key, "reason": "empty", "detail": "x", "variant": 0} for key in KEYS]
    return json.dumps(told | {"shard": None, "rows": 0, "bytes": 0, "sha256": None, "failed": failed}).encode()


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "config": (config, [_config_seed()]),
    "index": (index, [json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()]),
    "weights": (weights, [WHOLE[SHARD]]),
    "record": (record, [WHOLE[RECORD], _failed_record()]),
    "plan": (plan, [WHOLE[PLAN]]),
    "facts": (facts, [WHOLE[STORE / "store.json"]]),
    "shard": (shard, [WHOLE[SHARD]]),
    "lease": (lease, [json.dumps({"owner": "x", "pid": 1, "host": "y"}).encode()]),
    "manifest": (manifest, [b'{"key": "a", "path": "a.png", "caption": "x"}\n']),
    "archive": (archive, [_archive_seed()]),
    "table": (table, [json.dumps({"sizes": [[64, 64], [32, 128]], "side": 64}).encode()]),
    "structure": (structure, list(EVERY_KIND.values())),
    "image": (image, [*EVERY_KIND.values(), *_transparent_seeds()]),
}
