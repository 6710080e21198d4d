"""Checks of a store on disk that read its files without fastvae: safetensors, JSON and hashes."""

import hashlib
import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def committed(out: Path) -> dict[tuple[str, int], bytes]:
    """Return every committed row and the bytes of its latents; assert that no record is of a bad shard.

    Bad: missing, of another size or hash, with a row that fails its checksum or is not finite, or with a row twice.
    """
    rows: dict[tuple[str, int], bytes] = {}
    for path in sorted((out / "shards").glob("*.json")) if (out / "shards").is_dir() else []:
        record = json.loads(path.read_text())
        if record["shard"] is None:
            continue
        data = (out / "shards" / record["shard"]).read_bytes()
        assert len(data) == record["bytes"], f"{path.name}: {len(data)} of {record['bytes']} bytes"
        assert hashlib.sha256(data).hexdigest() == record["sha256"], f"{path.name}: another hash"
        names = shard_rows(out / "shards" / record["shard"])
        assert len(names) == record["rows"], path.name
        assert not names.keys() & rows.keys(), f"{path.name}: a row twice"
        rows |= names
    return rows


def shard_rows(path: Path) -> dict[tuple[str, int], bytes]:
    """Return the bytes of each row of a shard by (key, variant); assert that checksums fit and values are finite."""
    tensors = load_file(path)
    offsets, text = tensors["key_offset"].tolist(), tensors["key_utf8"].tobytes()
    rows = {}
    for row, checksum in enumerate(tensors["row_crc32"].tolist()):
        parts = [tensors[name][row] for name in ("mean", "logvar", "logvar_range", "alpha") if name in tensors]
        data = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        assert zlib.crc32(data) == checksum, f"{path.name} row {row}: another checksum"
        assert all(np.isfinite(part).all() for part in parts), f"{path.name} row {row}: not finite"
        key = text[offsets[row] : offsets[row + 1]].decode("utf-8", "surrogateescape")
        assert (key, int(tensors["variant"][row])) not in rows, f"{path.name}: a row twice"
        rows[key, int(tensors["variant"][row])] = data
    return rows


def failures(out: Path) -> dict[str, str]:
    """Return the reason of each key in failures.jsonl; assert that no key is there twice."""
    lines = [json.loads(line) for line in (out / "failures.jsonl").read_text("utf-8").splitlines()]
    assert not [key for key, count in Counter(line["key"] for line in lines).items() if count > 1]
    return {line["key"]: line["reason"] for line in lines}
