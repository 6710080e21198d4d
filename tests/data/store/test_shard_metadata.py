"""What shards state of themselves against what store.json says: an edit of either is found, and never read."""

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
    """A store of ten pictures in three shards, its source beside it; made once, inside a test, and copied."""
    if not _first:
        folder = tmp_path_factory.mktemp("first")
        write_pictures(folder / "in", 10)
        encode(folder / "in", folder / "out", vae=small_vae(), **OPTIONS)
        _first.append(folder)
    shutil.copytree(_first[0] / "in", tmp_path / "in")
    return shutil.copytree(_first[0] / "out", tmp_path / "out")


def edit(out: Path, field: str, value) -> None:
    facts = json.loads((out / "store.json").read_text())
    *parts, last = field.split(".")
    inner = facts
    for part in parts:
        inner = inner[part]
    inner[last] = value
    (out / "store.json").write_text(json.dumps(facts))


def restate(shard: Path, **stated: str) -> None:
    """Other metadata for ``shard``, with a record whose size and hash fit; None takes a field away."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {
        name: text for name, text in {**header["__metadata__"], **stated}.items() if text is not None
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    record = shard.with_suffix(".json")
    facts = json.loads(record.read_text()) | {"bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    record.write_text(json.dumps(facts))


def damages(out: Path, deep: bool) -> list[tuple[str, str]]:
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
def test_an_edited_store_json_is_found_and_neither_mended_read_nor_added_to(made, tmp_path, field):
    value, said, stated = EDITS[field]
    edit(made, field, value)
    what = f"says {field} {said}, and each of its 3 shards has {stated}"
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
def test_metadata_that_is_a_shards_own_is_none_of_store_jsons(made, field):
    edit(made, field, f"{SIDE}x{SIDE}")
    with pytest.raises(StoreError, match=r"store\.json is damaged: metadata cannot have this value"):
        verify(made, progress=False)


def test_the_store_json_of_another_store_is_found_and_no_latent_is_replaced(made, tmp_path):
    """The same images, made by another rule: a repair by that rule would replace each of them."""
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
def test_a_field_of_another_type_is_there_and_cannot_be_what_it_says(made, value):
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
    told = CliRunner().invoke(cli, ["info", str(made), "-q"])
    assert (told.exit_code, told.stdout) == (1, "")
    assert "has scaling.scaling_factor 0.18215, and store.json has 0.5: one of them was changed" in told.stderr
    mended = CliRunner().invoke(cli, ["repair", str(made), str(tmp_path / "in"), "-q"])
    assert (mended.exit_code, mended.stdout) == (1, "")
    assert "set it back to that, nothing was repaired" in mended.stderr


def test_every_edited_field_is_told_at_once_and_other_damage_beside_it(made, tmp_path):
    edit(made, "scaling.scaling_factor", 0.5)
    edit(made, "latent_channels", 8)
    shard = made / "shards" / f"000001-{SIDE}x{SIDE}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = damages(made, deep=True)
    assert sorted(file for file, _ in found) == [f"shards/{shard.name}", "store.json", "store.json"]
    assert all("each of its 2 shards has" in what for file, what in found if file == "store.json")
    with pytest.raises(StoreError, match=r"says scaling\.scaling_factor 0\.5, .*; says latent_channels 8, "):
        repair(made, tmp_path / "in", vae=small_vae(), device="cpu", progress=False)


STATED = {
    "scaling_factor": ("0.5", "scaling.scaling_factor 0.5, and store.json has 0.18215"),
    "space": ("scaled", "metadata.space scaled, and store.json has raw"),
    "identity": ("0" * 64, "identity_digest " + "0" * 64),
    "bucket": ("64x64", "bucket 64x64, and store.json has 32x32"),
    "latent_shape": ("[8, 4, 4]", "latent_channels 8, and store.json has 4"),
    "fvl": (None, "metadata.fvl nothing, and store.json has 1"),
}


@pytest.mark.parametrize("name", STATED)
def test_a_shard_that_states_otherwise_than_the_others_is_damaged_and_not_read(made, name):
    text, words = STATED[name]
    shard = made / "shards" / f"000001-{SIDE}x{SIDE}.safetensors"
    restate(shard, **{name: text})
    for deep in (False, True):
        ((file, what),) = damages(made, deep)
        assert file == f"shards/{shard.name}"
        assert what.startswith(f"has {words}")
    rows = LatentDataset(made)
    assert rows[0]["mean"].shape == (4, 4, 4)
    with pytest.raises(StoreError, match=rf"{shard.name} has "):
        rows[len(rows.shards()[0][1])]


def test_a_shard_that_states_otherwise_is_made_again(made, tmp_path):
    shard = made / "shards" / f"000001-{SIDE}x{SIDE}.safetensors"
    whole = shard.read_bytes()
    restate(shard, scaling_factor="0.5")
    assert repair(made, tmp_path / "in", vae=small_vae(), device="cpu", progress=False).units == [1]
    assert shard.read_bytes() == whole
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
def test_a_shape_that_no_latent_of_the_bucket_has_is_never_taken_for_store_jsons(made, shape):
    facts = json.loads((made / "store.json").read_text())
    stated = {**metadata_of(facts, (SIDE, SIDE), (4, 4, 4)), "latent_shape": shape}
    found = metadata_differences(facts, (SIDE, SIDE), {name: text for name, text in stated.items() if text is not None})
    assert found == {"latent_shape": ("[4, 4, 4]", (shape or "nothing")[:4096])}
    assert edited_fields([found] * 3) == {}


def test_the_only_shard_of_a_store_is_believed_by_its_hash(tmp_path):
    write_pictures(tmp_path / "in", 1)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    edit(tmp_path / "out", "scaling.scaling_factor", 0.5)
    (found,) = verify(tmp_path / "out", progress=False).damaged
    assert found.what == "says scaling.scaling_factor 0.5, and its only shard has 0.18215"
