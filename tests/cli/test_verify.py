"""The verb that says whether a store is sound: in words, as JSON, and by its exit code."""

import json

import pytest
from click.testing import CliRunner
from small_store import write_store

from fastvae.cli.main import cli
from fastvae.data.leases import Leases


def run(*arguments, code=0, verb="verify"):
    result = CliRunner().invoke(cli, [verb, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def made(tmp_path):
    return write_store(tmp_path / "out", {(32, 32): [f"{number}\x1b[31m.png" for number in range(6)]})


@pytest.mark.parametrize("deep", [[], ["--deep"]], ids=["by hash", "deep"])
def test_a_sound_store_is_exit_code_0(made, deep):
    assert run(made, *deep).stdout == "sound   2 of 2 units, 6 rows, 0 quarantined, 0.0 MB; 0 damaged, 0 to do\n"
    facts = json.loads(run(made, "--json", *deep).stdout)
    assert (facts["committed"], facts["pending"], facts["damaged"], facts["deep"]) == (2, 0, [], bool(deep))


def test_damage_is_exit_code_1_and_names_the_file(made):
    path = made / "shards" / "000001-32x32.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = run(made, code=1)
    first, last = result.stdout.splitlines()
    assert first == "damaged shards/000001-32x32.safetensors has another sha256 than its record says"
    assert last.startswith("damaged 1 of 2 units, 4 rows")
    facts = json.loads(run(made, "--json", "--deep", code=1).stdout)
    assert [damage["unit"] for damage in facts["damaged"]] == [1]


def test_a_stale_index_is_said_and_is_no_damage(made):
    (made / "index.jsonl").write_text("{}\n")
    assert run(made).stdout.startswith("sound")
    assert run(made, "--deep").stdout.startswith("stale   index.jsonl says something else")


def test_rebuild_index_writes_what_the_records_say_and_no_shard(made):
    run(made, "--rebuild-index")
    index = (made / "index.jsonl").read_bytes()
    assert len(index.splitlines()) == 6
    shards = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (made / "shards").iterdir()}
    for name in ("index.jsonl", "failures.jsonl"):
        (made / name).write_text("{}\n")
    assert run(made, "--deep", "--rebuild-index").stdout.startswith("sound")
    assert ((made / "index.jsonl").read_bytes(), (made / "failures.jsonl").read_bytes()) == (index, b"")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards} == shards
    (made / "index.jsonl").unlink()
    damaged = made / "shards" / "000001-32x32.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run(made, "--rebuild-index", code=1)
    assert not (made / "index.jsonl").exists()


def test_what_is_no_store_is_exit_code_1_in_a_sentence(tmp_path):
    result = run(tmp_path, code=1)
    assert result.stderr == f"fastvae: {tmp_path} is not a latent store: it has no store.json\n"


def test_repair_takes_back_what_is_damaged_and_nothing_else(made):
    whole = {path: path.read_bytes() for path in (made / "shards").iterdir()}
    assert run(made, verb="repair").stdout == "done    0 units taken back\n"
    path = made / "shards" / "000000-32x32.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    stray = made / "shards" / "000007-32x32.json"
    stray.write_text("{}")
    result = run(made, verb="repair")
    assert "damaged shards/000000-32x32.safetensors has " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("done    1 units taken back: run the same fastvae encode again")
    gone = {path.with_suffix(".json"), stray}
    assert {path for path in whole if not path.exists()} == gone - {stray}
    assert not stray.exists()
    assert all(other.read_bytes() == data for other, data in whole.items() if other not in gone and other != path)
    assert json.loads(run(made, "--json", verb="repair").stdout)["withdrawn"] == []


def test_repair_waits_for_no_run_that_is_writing(made):
    with Leases(made / "leases") as other:
        result = run(made, verb="repair", code=5)
        assert f"is being written, lease run-{other.owner}: let that run end first" in result.stderr
    run(made, verb="repair")
