"""The metadata of shards against store.json: verify finds an edit of either, and no reader accepts it."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.cli.main import cli
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.exporting.export import export
from fastvae.data.store.errors import StoreError
from fastvae.data.store.shard_metadata import edited_fields, metadata_differences, metadata_of
from fastvae.data.store.verify import verify
from fastvae.system.atomic_files import sha256_of

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu", "shard_mb": 0.002}
_first: list[Path] = []


@pytest.fixture
def made(tmp_path_factory, tmp_path):
    """A copy of a store of ten pictures in three shards, and of its source; made once, inside a test."""
    if not _first:
        folder = tmp_path_factory.mktemp("first")
        write_pictures(folder / "in", 10)
        encode(folder / "in", folder / "out", vae=small_vae(), **OPTIONS)
        _first.append(folder)
    shutil.copytree(_first[0] / "in", tmp_path / "in")
    return shutil.copytree(_first[0] / "out", tmp_path / "out")


def edit(out: Path, field: str, value) -> None:
    """Set a field of store.json."""
    facts = json.loads((out / "store.json").read_text())
    *parts, last = field.split(".")
    inner = facts
    for part in parts:
        inner = inner[part]
    inner[last] = value
    (out / "store.json").write_text(json.dumps(facts))


def set_metadata(shard: Path, **changes: str) -> None:
    """Change metadata of ``shard``, and size and hash in its record; None removes a field."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {
        name: text for name, text in {**header["__metadata__"], **changes}.items() if text is not None
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    record = shard.with_suffix(".json")
    facts = json.loads(record.read_text()) | {"bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    record.write_text(json.dumps(facts))


def damages(out: Path, deep: bool) -> list[tuple[str, str]]:
    """Return the damage that verify finds."""
    return [(damage.file, damage.what) for damage in verify(out, deep=deep, progress=False).damaged]


EDITS = {
    "scaling.scaling_factor": (0.5, "0.5", "0.18215"),
    "scaling.shift_factor": (0.25, "0.25", "null"),
    "scaling.latents_mean": ([0, 0, 0, 1], "[0, 0, 0, 1]", "null"),
    "scaling.latents_std": ([1, 1, 1, 2], "[1, 1, 1, 2]", "null"),
    "scaling.batch_norm": (True, "true", "false"),
    "latent_channels": (8, "8", "4"),
    "downsample_factor": (4, "4", "8"),
    "metadata.space": ("scaled", "scaled", "raw"),
    "metadata.scaling_factor": ("0.5", "0.5", "0.18215"),
}


@pytest.mark.parametrize("field", EDITS)
def test_an_edited_store_json_is_found_and_not_repaired_read_or_extended(made, tmp_path, field):
    value, ours, shards = EDITS[field]
    edit(made, field, value)
    what = f"says {field} {ours}, and each of its 3 shards has {shards}"
    assert damages(made, deep=False) == damages(made, deep=True) == [("store.json", what)]
    for scaled in (False, True):
        with pytest.raises(StoreError, match="batch norm" if scaled and field.endswith("batch_norm") else field):
            LatentDataset(made, scaled=scaled)[0]
    with pytest.raises(StoreError, match=field):
        export(made, tmp_path / "new", to="wds", progress=False)
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(StoreError) as refused:
        repair(made, tmp_path / "in", vae=small_vae(), device="cpu", progress=False)
    assert str(refused.value) == f"{made / 'store.json'} {what}: set it back to that, nothing was repaired"
    write_pictures(tmp_path / "in", 11)
    with pytest.raises(StoreError, match=rf"store\.json was edited: {field}"):
        encode(tmp_path / "in", made, vae=small_vae(), **OPTIONS)
    assert {path: path.read_bytes() for path in before} == before


def test_metadata_that_store_json_lacks_is_found(made):
    facts = json.loads((made / "store.json").read_text())
    del facts["metadata"]["space"]
    (made / "store.json").write_text(json.dumps(facts))
    assert damages(made, deep=False) == [
        ("store.json", "says metadata.space nothing, and each of its 3 shards has raw")
    ]
    with pytest.raises(StoreError, match=r"has metadata\.space raw, and store\.json has nothing"):
        LatentDataset(made)[0]


@pytest.mark.parametrize("field", ["metadata.bucket", "metadata.latent_shape", "metadata.identity"])
def test_store_json_must_not_have_metadata_of_a_shard(made, field):
    edit(made, field, f"{SIDE}x{SIDE}")
    with pytest.raises(StoreError, match=r"store\.json is damaged: metadata cannot have this value"):
        verify(made, progress=False)


def test_the_store_json_of_another_store_is_found_and_nothing_is_repaired(made, tmp_path):
    """The other store has the same images with another preprocessing: a repair with it would replace each latent."""
    encode(tmp_path / "in", tmp_path / "other", vae=small_vae(), alpha="drop", **OPTIONS)
    digest = json.loads((made / "store.json").read_text())["identity_digest"]
    shutil.copy(tmp_path / "other" / "store.json", made / "store.json")
    other = json.loads((made / "store.json").read_text())["identity_digest"]
    what = f"says identity_digest {other}, and each of its 3 records has {digest}"
    assert damages(made, deep=False) == damages(made, deep=True) == [("store.json", what)]
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match="set it back to that, nothing was repaired"):
        repair(made, tmp_path / "in", vae=small_vae(), device="cpu", progress=False)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("value", ["4", 4.0, True])
def test_a_field_of_another_type_is_damage(made, value):
    edit(made, "latent_channels", value)
    with pytest.raises(StoreError, match=r"store\.json is damaged: latent_channels cannot have this value"):
        LatentDataset(made)


def test_an_edited_store_json_is_exit_code_1_of_every_verb(made, tmp_path):
    edit(made, "scaling.scaling_factor", 0.5)
    found = CliRunner().invoke(cli, ["verify", str(made), "-q"])
    assert found.exit_code == 1
    assert found.stdout.splitlines()[0] == (
        "damaged store.json says scaling.scaling_factor 0.5, and each of its 3 shards has 0.18215"
    )
    shown = CliRunner().invoke(cli, ["info", str(made), "-q"])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "has scaling.scaling_factor 0.18215, and store.json has 0.5: one of them was changed" in shown.stderr
    mended = CliRunner().invoke(cli, ["repair", str(made), str(tmp_path / "in"), "-q"])
    assert (mended.exit_code, mended.stdout) == (1, "")
    assert "set it back to that, nothing was repaired" in mended.stderr


def test_every_edited_field_and_other_damage_are_reported_together(made, tmp_path):
    edit(made, "scaling.scaling_factor", 0.5)
    edit(made, "latent_channels", 8)
    shard = made / "shards" / f"000001-{SIDE}x{SIDE}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = damages(made, deep=True)
    assert sorted(file for file, _ in found) == [f"shards/{shard.name}", "store.json", "store.json"]
    assert all("each of its 2 shards has" in what for file, what in found if file == "store.json")
    with pytest.raises(StoreError, match=r"says scaling\.scaling_factor 0\.5, .*; says latent_channels 8, "):
        repair(made, tmp_path / "in", vae=small_vae(), device="cpu", progress=False)


METADATA = {
    "scaling_factor": ("0.5", "scaling.scaling_factor 0.5, and store.json has 0.18215"),
    "space": ("scaled", "metadata.space scaled, and store.json has raw"),
    "identity": ("0" * 64, "identity_digest " + "0" * 64),
    "bucket": ("64x64", "bucket 64x64, and store.json has 32x32"),
    "latent_shape": ("[8, 4, 4]", "latent_channels 8, and store.json has 4"),
    "fvl": (None, "metadata.fvl nothing, and store.json has 1"),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_shard_with_other_metadata_than_the_others_is_damaged_and_not_read(made, name):
    text, words = METADATA[name]
    shard = made / "shards" / f"000001-{SIDE}x{SIDE}.safetensors"
    set_metadata(shard, **{name: text})
    for deep in (False, True):
        ((file, what),) = damages(made, deep)
        assert file == f"shards/{shard.name}"
        assert what.startswith(f"has {words}")
    rows = LatentDataset(made)
    assert rows[0]["mean"].shape == (4, 4, 4)
    with pytest.raises(StoreError, match=rf"{shard.name} has "):
        rows[len(rows.shards()[0][1])]


def test_a_shard_with_other_metadata_is_encoded_again(made, tmp_path):
    shard = made / "shards" / f"000001-{SIDE}x{SIDE}.safetensors"
    before = shard.read_bytes()
    set_metadata(shard, scaling_factor="0.5")
    assert repair(made, tmp_path / "in", vae=small_vae(), device="cpu", progress=False).units == [1]
    assert shard.read_bytes() == before
    assert damages(made, deep=True) == []


SHAPES = {
    "larger than the bucket": "[4, 1000, 1000]",
    "of no size": "[4, 0, 0]",
    "of another aspect": "[4, 4, 2]",
    "of no dimension": "[]",
    "nothing": "null",
    "no JSON": "x",
    "nested too deep": "[" * 100_000,
    "left out": None,
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_impossible_latent_shape_is_no_edit_of_store_json(made, shape):
    facts = json.loads((made / "store.json").read_text())
    metadata = {**metadata_of(facts, (SIDE, SIDE), (4, 4, 4)), "latent_shape": shape}
    found = metadata_differences(
        facts, (SIDE, SIDE), {name: text for name, text in metadata.items() if text is not None}
    )
    assert found == {"latent_shape": ("[4, 4, 4]", (shape or "nothing")[:4096])}
    assert edited_fields([found] * 3) == {}


def test_the_only_shard_of_a_store_is_trusted_by_its_hash(tmp_path):
    write_pictures(tmp_path / "in", 1)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    edit(tmp_path / "out", "scaling.scaling_factor", 0.5)
    (found,) = verify(tmp_path / "out", progress=False).damaged
    assert found.what == "says scaling.scaling_factor 0.5, and its only shard has 0.18215"
