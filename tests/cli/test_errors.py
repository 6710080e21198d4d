"""Produces the error of each row of docs/errors.md: exit code, message, no traceback."""

import errno
import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.fatal_reader import FatalReader
from support.small_store import SIDE, picture, write_pictures, write_store

import fastvae.system.atomic_files
from fastvae.cli.main import cli
from fastvae.data.encoding.worker import MAX_DEATHS
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.read_text().splitlines()]
ROWS = [
    (row[0].removeprefix("| ").strip(), int(row[1]), row[2].strip(" |")) for row in ROWS if row[1:] and row[1].isdigit()
]


@pytest.fixture
def places(tmp_path, model):
    """A folder of pictures, a store of generated rows, and a path where a verb may write."""
    write_pictures(tmp_path / "in", 2)
    store = write_store(tmp_path / "store", {(32, 32): ["x.png", "x.jpg", "../y.png"]})
    return {"in": tmp_path / "in", "store": store, "out": tmp_path / "out", "model": model}


def encode(places, *more):
    fixed = ["--vae", places["model"], "--buckets", SIDE, "--dtype", "fp32", "-q"]
    return ["encode", places["in"], places["out"], *fixed, *more]


def ended(arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments] + ["-q"] * ("-q" not in arguments))


def damaged_shard(places, monkeypatch):
    path = places["store"] / "shards" / "000000-32x32.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return ended(["verify", places["store"]])


def edited(places, monkeypatch):
    path = places["store"] / "store.json"
    facts = json.loads(path.read_text())
    facts["identity"]["numerics"]["dtype"] = "fp16"
    path.write_text(json.dumps(facts))
    return ended(["info", places["store"]])


def edited_scaling(places, monkeypatch, verb="verify", *more):
    assert ended(encode(places)).exit_code == 0
    path = places["out"] / "store.json"
    facts = json.loads(path.read_text())
    facts["scaling"]["scaling_factor"] = 0.5
    path.write_text(json.dumps(facts))
    return ended([verb, places["out"], *more])


def without_store_json(places, monkeypatch):
    (places["store"] / "store.json").unlink()
    return ended(["info", places["store"]])


def folder_for_a_record(places, monkeypatch):
    path = places["store"] / "shards" / "000000-32x32.json"
    path.unlink()
    path.mkdir()
    return ended(["verify", places["store"]])


def rebuilt_while_damaged(places, monkeypatch):
    damaged_shard(places, monkeypatch)
    return ended(["verify", places["store"], "--rebuild-index"])


def link_to_nothing(places, monkeypatch):
    places["out"].symlink_to(places["out"].with_name("gone"))
    return ended(encode(places))


def empty_store(places, monkeypatch):
    for path in (places["store"] / "shards").glob("*.json"):
        path.unlink()
    return ended(["decode", places["store"], places["out"]])


def means_alone(places, monkeypatch):
    store = write_store(places["out"], {(32, 32): ["x.png"]}, posterior="mean")
    return ended(["export", store, places["out"].parent / "new", "--to", "wds", "--posterior", "sample"])


def failing(places, monkeypatch, *more):
    (places["in"] / "bad.png").write_bytes(b"")
    return ended(encode(places, "--max-failures", "0", *more))


def other_identity(places, monkeypatch):
    assert ended(encode(places)).exit_code == 0
    return ended(encode(places, "--posterior", "mean"))


def planned_for_ever(places, monkeypatch):
    monkeypatch.setattr("fastvae.data.store.lock.LOCK_TIMEOUT", 0.2)
    places["out"].mkdir()
    with locked(places["out"]):
        return ended(encode(places))


def repaired_under_a_run(places, monkeypatch):
    with Leases(places["store"] / "leases"):
        return ended(["repair", places["store"]])


def repaired_without_a_source(places, monkeypatch):
    damaged_shard(places, monkeypatch)
    return ended(["repair", places["store"]])


def tar_of(path, *names):
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            picture(number + len(names)).save(path.with_suffix(".png"))
            tar.add(path.with_suffix(".png"), name)
    return path


def from_another_archive(places, monkeypatch):
    places["in"] = tar_of(places["in"] / "0.tar", "a.png")
    assert ended(encode(places)).exit_code == 0
    places["in"] = tar_of(places["in"].with_name("1.tar"), "a.png", "b.png")
    return ended(encode(places))


def two_images_in_a_sample(places, monkeypatch):
    places["in"] = tar_of(places["in"] / "0.tar", "a.image.png", "a.mask.png")
    return ended(encode(places))


def pruned_by_a_part(places, monkeypatch):
    places["in"] = tar_of(places["in"] / "0.tar", "a.png", "b.png")
    places["in"].write_bytes(places["in"].read_bytes()[:-9000])
    return ended(encode(places, "--prune"))


def repaired_from_other_pictures(places, monkeypatch):
    assert ended(encode(places)).exit_code == 0
    shard = next((places["out"] / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for number, path in enumerate(sorted(places["in"].glob("*.png"))):
        picture(100 + number).save(path)
    return ended(["repair", places["out"], places["in"]])


def repaired_without_its_plan(places, monkeypatch):
    for path in (places["store"] / "plan").iterdir():
        path.unlink()
    return ended(["repair", places["store"]])


def encoded_without_its_plan(places, monkeypatch):
    assert ended(encode(places)).exit_code == 0
    next((places["out"] / "plan").iterdir()).unlink()
    return ended(encode(places))


def ending_its_process(places, monkeypatch):
    """Three processes died on the only unit, and one of its images ends each child too."""
    (places["in"] / "001.png").rename(places["in"] / "001 fatal.png")
    monkeypatch.setattr("fastvae.data.encoding.run.ImageReader", FatalReader)
    monkeypatch.setattr(Leases, "is_taken", lambda leases, name: name.isdigit())
    monkeypatch.setattr(Leases, "deaths", lambda leases, name: MAX_DEATHS)
    return ended(encode(places, "--on-error", "fail"))


def full_disk(places, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fastvae.system.atomic_files.os, "fsync", full)
    return ended(encode(places))


def interrupted(places, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvae.data.encoding.encode.encode", stop)
    return ended(encode(places))


def no_path(places, monkeypatch):
    store = write_store(places["out"], {(32, 32): ["../y.png"]})
    return ended(["export", store, places["out"].parent / "new", "--to", "npz-kohya"])


PRODUCED = {
    "a damaged shard": damaged_shard,
    "a folder that is no store": lambda p, m: ended(["verify", p["in"]]),
    "an edited store.json": edited,
    "an edited scaling in store.json": edited_scaling,
    "a repair of such a store": lambda p, m: edited_scaling(p, m, "repair", p["in"]),
    "what is neither store nor model": without_store_json,
    "a folder at a file's path": folder_for_a_record,
    "a rebuilt index of a damaged store": rebuilt_while_damaged,
    "an export onto what is there": lambda p, m: ended(["export", p["store"], p["in"], "--to", "wds"]),
    "a store without a row": empty_store,
    "what the store does not hold": means_alone,
    "an output that is a link to nothing": link_to_nothing,
    "no such option": lambda p, m: ended(["info", p["store"], "--deep"]),
    "a missing argument": lambda p, m: ended(["verify"]),
    "a source without images": lambda p, m: ended(encode({**p, "in": p["in"] / "nothing"})),
    "the source as output": lambda p, m: ended(encode({**p, "out": p["in"]})),
    "a key that the store has from another source": from_another_archive,
    "several images in a sample of a tar": two_images_in_a_sample,
    "a prune by a source that is read in part": pruned_by_a_part,
    "a wrong amount": lambda p, m: ended(encode(p, "--batch", "0")),
    "a pattern that leaves no image": lambda p, m: ended(encode(p, "--exclude", "*")),
    "wrong rows": lambda p, m: ended(["decode", p["store"], p["out"], "--rows", "x"]),
    "rows that are not there": lambda p, m: ended(["decode", p["store"], p["out"], "--rows", "9:10"]),
    "a wrong device": lambda p, m: ended(encode(p, "--device", "gpu")),
    "a posterior that the layout cannot hold": lambda p, m: ended(
        ["export", p["store"], p["out"], "--to", "npz-kohya", "--posterior", "dist"]
    ),
    "a family of another layout": lambda p, m: ended(["export", p["store"], p["out"], "--to", "wds", "--family", "sd"]),
    "a key that is no path": no_path,
    "a repair without the images": repaired_without_a_source,
    "a repair from other pictures": repaired_from_other_pictures,
    "a repair of a store without its plan": repaired_without_its_plan,
    "a run into a store without its plan": encoded_without_its_plan,
    "more failures than allowed": failing,
    "the first failure, with --on-error fail": lambda p, m: failing(p, m, "--on-error", "fail"),
    "an image that ends its process, with --on-error fail": ending_its_process,
    "an image that compare cannot read": lambda p, m: ended(
        ["compare", f"{p['model']}/config.json", "--vae", p["model"], "--device", "cpu"]
    ),
    "another identity": other_identity,
    "a plan that takes for ever": planned_for_ever,
    "a repair under a run": repaired_under_a_run,
    "a full disk": full_disk,
    "an interruption": interrupted,
}


def test_every_row_is_produced():
    assert [row[0] for row in ROWS] == list(PRODUCED)


@pytest.mark.parametrize(("name", "code", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_table(name, code, words, places, monkeypatch):
    result = PRODUCED[name](places, monkeypatch)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    said = result.stdout + result.stderr
    assert words in said or words in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
    if code != 2 and result.stderr:
        assert result.stderr.startswith("fastvae: ")
