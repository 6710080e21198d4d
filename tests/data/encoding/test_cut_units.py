"""Units that an interruption or the time limit cuts: the finished rows are committed, the others become a unit."""

import json
import threading

import pytest
from click.testing import CliRunner
from support.repairs import flip
from support.small_store import SIDE, picture, small_vae, write_pictures
from support.store_checks import committed

from fastvae.cli.main import cli
from fastvae.data.encoding import worker as workers
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.report import Interrupted
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu", "workers": 1, "deterministic": True}
PICTURES = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a manifest of pictures with captions, one of them broken, and the names of the other rows."""
    folder = tmp_path_factory.mktemp("cut")
    names = write_pictures(folder / "in", PICTURES)
    (folder / "in" / names[1]).write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = [json.dumps({"key": name, "image": f"in/{name}", "caption": f"picture {name}"}) for name in names]
    (folder / "all.jsonl").write_text("\n".join(lines))
    return folder / "all.jsonl", {(name, 0) for name in names if name != names[1]}


def interrupt_at(monkeypatch, number, before=lambda: None):
    """Interrupt the run when its ``number``-th image is encoded, after a call of ``before``."""
    start, calls = MomentEncoder.start, iter(range(1, 100))

    def interrupted(encoder, pixels):
        if next(calls) == number:
            before()
            raise KeyboardInterrupt
        return start(encoder, pixels)

    monkeypatch.setattr(MomentEncoder, "start", interrupted)


def captions(out):
    return {key: columns["caption"] for key, columns in Store.open(out).columns().items()}


def test_an_interruption_commits_the_part_made_unit(tmp_path, monkeypatch, whole):
    source, rows = whole
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted, match=r"^5 rows committed, \d lost$") as stopped:
            encode(source, out, vae=small_vae(), **OPTIONS)
    report = json.loads(stopped.value.report.to_json())
    assert (report["interrupted"], report["ok"], report["failed"]) == (True, 4, 1)
    assert report["lost"] >= 1
    assert [len(unit.rows) for unit in Store.open(out).units()] == [5, 1]
    kept = committed(out)
    assert len(kept) == 4
    again = encode(source, out, vae=small_vae(), **OPTIONS)
    assert (again.resumed, again.ok) == (4, 1)
    assert committed(out).keys() == rows
    assert committed(out).items() >= kept.items()
    assert len(captions(out)) == PICTURES
    assert verify(out, deep=True).damaged == []


def test_a_unit_that_takes_too_long_is_committed_and_goes_on_as_another(tmp_path, monkeypatch, whole):
    source, rows = whole
    clock = iter(range(0, 10**6, 30))  # seconds: a call of the clock takes 30, so that a few rows end a unit
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))
    report = encode(source, tmp_path / "out", vae=small_vae(), commit_seconds=60, **OPTIONS | {"deterministic": False})
    units = Store.open(tmp_path / "out").units()
    assert len(units) > 2
    assert sum(len(unit.rows) for unit in units) == PICTURES
    assert report.ok == PICTURES - 1
    assert committed(tmp_path / "out").keys() == rows
    assert len(captions(tmp_path / "out")) == PICTURES


@pytest.mark.parametrize("options", [{"commit_seconds": 0, "deterministic": False}, {"commit_seconds": 1e-9}])
def test_without_a_limit_a_unit_is_never_cut(tmp_path, whole, options):
    encode(whole[0], tmp_path / "out", vae=small_vae(), **OPTIONS | options)
    assert len(Store.open(tmp_path / "out").units()) == 1


def test_another_process_encodes_what_a_cut_left(tmp_path, monkeypatch, whole):
    """It has read the plan before the cut."""
    source, rows = whole
    out, reports, waiting, sleep = tmp_path / "out", [], threading.Event(), workers.time.sleep

    def second():
        reports.append(encode(source, out, vae=small_vae(), **OPTIONS))

    def start_second():
        thread.start()
        assert waiting.wait(20)

    thread = threading.Thread(target=second)
    interrupt_at(monkeypatch, 4, start_second)
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: (waiting.set(), sleep(0.05)))
    with pytest.raises(Interrupted):
        encode(source, out, vae=small_vae(), **OPTIONS)
    thread.join(30)
    assert [(report.elsewhere, report.ok) for report in reports] == [(3, 2)]
    assert committed(out).keys() == rows
    assert [len(unit.rows) for unit in Store.open(out).units()] == [4, 2]


def test_a_caption_that_changed_and_an_image_that_was_planned_again_survive_a_cut(tmp_path, whole):
    source, _ = whole
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(Interrupted):
            encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS)
    store = Store.open(tmp_path / "out")
    (unit,) = store.units()
    last = unit.rows[-1]
    edited = type(last.file)(last.file.key, last.file.size + 1, 1, last.file.place, {"caption": "edited"})
    store.extend_plan([(unit.bucket, type(last)(edited, 0, last.original_hw))], lambda bucket: 100)
    part, rest = store.split(unit, {row.name for row in unit.rows[:2]})
    assert [row.name for row in part.rows] == [row.name for row in unit.rows[:2]]
    assert [row.name for row in rest.rows] == [row.name for row in unit.rows[2:-1]]
    reopened = Store.open(tmp_path / "out")
    assert reopened.columns()[last.file.key] == {"caption": "edited"}
    assert [len(unit.rows) for unit in reopened.units()] == [2, 1, PICTURES - 3]
    assert store.split(rest, {row.name for row in rest.rows}) is None


@pytest.mark.parametrize("step", ["plan_rows", "check_fast_path", "_complete"])
def test_an_interruption_before_and_after_the_rows_has_a_report_too(tmp_path, monkeypatch, whole, step):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    module = "encode" if step == "plan_rows" else "run"
    monkeypatch.setattr(f"fastvae.data.encoding.{module}.{step}", interrupted)
    done = PICTURES * (step == "_complete")
    with pytest.raises(Interrupted, match=f"^{done} rows committed, 0 lost$") as stopped:
        encode(whole[0], tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert stopped.value.report.interrupted
    assert stopped.value.done == {0} if done else not stopped.value.done


def test_json_of_an_interrupted_repair_counts_what_was_committed(made, tmp_path, monkeypatch):
    picture(77).save(tmp_path / "in" / "bad.png")
    for unit in (0, 1):
        flip(made / "shards" / f"00000{unit}-32x32.safetensors")
    command = ["repair", made, tmp_path / "in", "--device", "cpu", "--workers", 1, "--deterministic", "--json", "-q"]

    def repair():
        return CliRunner().invoke(cli, [*map(str, command), "--retry-failed"])

    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        stopped = repair()
    facts, report = json.loads(stopped.stdout), json.loads(stopped.stdout)["report"]
    assert (stopped.exit_code, facts["units"], facts["retried"], len(facts["damaged"])) == (75, [0], 0, 2)
    assert (report["interrupted"], report["ok"]) == (True, 4)
    assert report["kept"] == report["failed"] == 0
    assert report["lost"] >= 1  # a damaged unit is not cut
    assert f"fastvae: interrupted: 4 rows committed, {report['lost']} lost; " in stopped.stderr
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        again = json.loads(repair().stdout)
    assert (again["units"], again["retried"], again["report"]["ok"]) == ([1], 0, 4)
    last = json.loads(repair().stdout)
    assert (last["units"], last["retried"], last["report"]["ok"]) == ([], 1, 1)
    assert verify(made, deep=True).damaged == []
