"""fastvae verify: its text, its JSON and its exit codes."""

import json

import pytest
from click.testing import CliRunner
from support.small_store import SIDE, write_pictures, write_store

from fastvae.cli.main import cli
from fastvae.data.store.leases import Leases
from fastvae.data.store.store import Store


def run(*arguments, code=0, verb="verify"):
    result = CliRunner().invoke(cli, [verb, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def made(tmp_path):
    path = write_store(tmp_path / "out", {(32, 32): [f"{number}\x1b[31m.png" for number in range(6)]})
    Store.open(path).write_derived()
    return path


@pytest.mark.parametrize("deep", [[], ["--deep"]], ids=["by hash", "deep"])
def test_a_sound_store_is_exit_code_0(made, deep):
    assert run(made, *deep).stdout == "sound   2 of 2 units, 6 rows, 0 quarantined, 3.3 KiB; 0 damaged, 0 to do\n"
    facts = json.loads(run(made, "--json", *deep).stdout)
    assert (facts["committed"], facts["pending"], facts["damaged"], facts["deep"]) == (2, 0, [], bool(deep))


def test_the_plan_is_printed_first_and_not_with_quiet(made):
    assert run(made).stderr == f"verify  {made}  2 of 2 units, 6 rows, 3.3 KiB: hashes\n"
    assert "hashes, rows and values" in run(made, "--deep").stderr
    assert run(made, "-q").stderr == ""


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


def test_a_stale_index_is_reported_and_is_no_damage(made):
    (made / "index.jsonl").write_text("{}\n")
    for deep in ([], ["--deep"]):
        first, last = run(made, *deep).stdout.splitlines()
        assert first.startswith("stale   index.jsonl is missing or says something else")
        assert last.startswith("sound")


def test_a_missing_index_is_stale_where_something_is_committed(made, tmp_path):
    (made / "index.jsonl").unlink()
    (made / "failures.jsonl").unlink()
    assert [line.split()[1] for line in run(made).stdout.splitlines()[:2]] == ["index.jsonl", "failures.jsonl"]
    assert json.loads(run(write_store(tmp_path / "none", {}), "--json").stdout)["stale"] == []


def test_rebuild_index_writes_the_index_from_the_records(made):
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
    said = run(made, "--rebuild-index", "-q", code=1).stderr
    assert said.startswith("fastvae: index.jsonl and failures.jsonl were not rewritten: the store is damaged")
    assert not (made / "index.jsonl").exists()


def test_a_folder_that_is_no_store_is_exit_code_1(tmp_path):
    result = run(tmp_path, code=1)
    assert result.stderr == f"fastvae: {tmp_path} is not a latent store: it has no store.json\n"


@pytest.fixture
def encoded(tmp_path, model):
    """A store of six pictures in two shards, and its source."""
    write_pictures(tmp_path / "in", 6)
    options = ["--vae", model, "--buckets", SIDE, "--dtype", "fp32", "--shard-mb", 0.002, "--device", "cpu", "-q"]
    run(tmp_path / "in", tmp_path / "out", *options, verb="encode")
    return tmp_path / "in", tmp_path / "out"


def test_repair_encodes_and_reports_damaged_units(encoded):
    source, made = encoded
    assert run(made, verb="repair").stdout == "repair  0 damaged units done again, 0 failed images tried again\n"
    path = made / "shards" / "000000-32x32.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    asked = run(made, verb="repair", code=2)
    assert f"are encoded again from their images: fastvae repair {made} SRC" in asked.stderr
    result = run(made, source, "--device", "cpu", verb="repair")
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("damaged shards/000000-32x32.safetensors has ")
    assert "done    4 ok, 2 resumed, 0 quarantined" in result.stdout
    assert last == "repair  1 damaged units done again, 0 failed images tried again"
    assert path.read_bytes() == whole
    plan = result.stderr.splitlines()
    assert plan[0].startswith(f"verify  {made}  1 of 2 units, 2 rows, ")
    assert plan[1].endswith("named by the store; --vae takes another")
    assert plan[2].startswith("repair  ")
    assert "4 images" in plan[2]
    facts = json.loads(run(made, source, "--json", "-q", verb="repair").stdout)
    assert (facts["units"], facts["damaged"], facts["report"]) == ([], [], None)


def test_repair_retries_failures_with_the_exit_codes_of_encode(encoded):
    source, made = encoded
    (source / "bad.png").write_bytes(b"")
    run(source, made, "--vae", store_model(made), "--buckets", SIDE, "--max-failures", 0, "-q", verb="encode", code=3)
    assert "0 failed images tried again" in run(made, source, verb="repair").stdout
    result = run(made, source, "--retry-failed", "--max-failures", 0, "--json", verb="repair", code=3)
    facts = json.loads(result.stdout)
    assert (facts["retried"], facts["report"]["failed"], facts["report"]["exceeded"]) == (1, 1, True)
    write_pictures(source, 1)
    (source / "000.png").rename(source / "bad.png")
    assert "1 ok, 6 resumed" in run(made, source, "--retry-failed", verb="repair").stdout


def store_model(made) -> str:
    return json.loads((made / "store.json").read_text())["source"]["vae"]


def test_repair_waits_for_no_run_that_is_writing(made):
    with Leases(made / "leases") as other:
        result = run(made, verb="repair", code=5)
        assert f"is being written, lease run-{other.owner}: let that run end first" in result.stderr
    run(made, verb="repair")
