"""A source that changes between runs: another origin's keys, moved archives, edited and deleted images."""

import json
import os
import shutil
import tarfile

import pytest
from support.small_store import picture, small_vae

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.rows import Origin, SourceFile
from fastvae.data.store.info import store_facts
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify

OPTIONS = {"buckets": 32, "dtype": "fp32", "progress": False, "device": "cpu", "workers": 1}


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def folder(path, **seeds):
    """Write a picture of each seed as NAME.png."""
    path.mkdir(parents=True, exist_ok=True)
    for name, seed in seeds.items():
        picture(seed).save(path / f"{name}.png")
    return path


def archive(path, **seeds):
    """Write a tar with a picture of each seed as NAME.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, seed in seeds.items():
            picture(seed).save(path.with_suffix(".png"))
            tar.add(path.with_suffix(".png"), f"{name}.png")
    path.with_suffix(".png").unlink()
    return path


def run(src, out, vae, **options):
    return encode(src, out, vae=vae, **{**OPTIONS, **options})


def keys_of(out):
    return sorted(key for key, _ in Store.open(out).resolve())


def bytes_of(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "leases" not in path.parts}


def test_another_archive_with_the_same_keys_is_refused_and_both_are_named(tmp_path, vae):
    first, second, out = (
        archive(tmp_path / "000.tar", a=0, b=1),
        archive(tmp_path / "001.tar", a=2, b=3),
        tmp_path / "out",
    )
    run(first, out, vae)
    before = bytes_of(out)
    message = (
        "'a' is in .* from 000.tar, and 001.tar has another image of that key .2 such keys.: encode both in one call"
    )
    for options in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match=message):
            run(second, out, vae, **options)
    assert bytes_of(out) == before


def test_archives_with_the_same_keys_in_one_call_are_kept_apart_in_any_order(tmp_path, vae):
    first, second, out = (
        archive(tmp_path / "000.tar", a=0, b=1),
        archive(tmp_path / "x" / "001.tar", a=2, b=3),
        tmp_path / "out",
    )
    run(first, out, vae)
    report = run([second, first], out, vae)
    assert (report.ok, report.resumed, report.replaced, report.duplicate_keys) == (2, 2, 0, 2)
    assert keys_of(out) == ["a", "a~2", "b", "b~2"]
    origins = {file.key: file.origin.name for file in Store.open(out).planned_files().values()}
    assert origins == {"a": "000.tar", "b": "000.tar", "a~2": "001.tar", "b~2": "001.tar"}
    for sources, gone in (([first, second], 0), ([second, first], 0), (second, 2), (first, 2)):
        report = run(sources, out, vae)
        assert (report.ok, report.resumed, report.gone) == (0, 4, gone), sources
    third = archive(tmp_path / "002.tar", a=4)
    report = run([third, first], out, vae)
    assert (report.ok, report.replaced, report.gone) == (1, 0, 2)
    assert "a~3" in keys_of(out)


def test_another_folder_with_a_common_name_is_refused(tmp_path, vae):
    first, second, out = folder(tmp_path / "one", a=0, b=1), folder(tmp_path / "two", a=2, c=3), tmp_path / "out"
    run(first, out, vae)
    with pytest.raises(ValueError, match=r"'a\.png' is in .* from one, and two has another image of that key"):
        run(second, out, vae)
    assert keys_of(out) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="from one, and one elsewhere has another"):
        run(folder(tmp_path / "x" / "one", a=2, c=3), out, vae)


def test_a_moved_folder_is_the_same_origin(tmp_path, vae):
    source, out = folder(tmp_path / "in", a=0, b=1), tmp_path / "out"
    run(source, out, vae)
    source.rename(tmp_path / "moved")
    picture(7).save(tmp_path / "moved" / "a.png")
    report = run(tmp_path / "moved", out, vae)
    assert (report.ok, report.resumed, report.replaced_keys) == (1, 1, ["a.png"])


def test_a_plan_without_origins_is_resumed_as_before(tmp_path, vae):
    first, second, out = (
        archive(tmp_path / "000.tar", a=0, b=1),
        archive(tmp_path / "001.tar", a=2, b=3),
        tmp_path / "out",
    )
    run(first, out, vae)
    (plan,) = (out / "plan").iterdir()
    lines = [json.loads(line) for line in plan.read_text().splitlines()]
    assert {tuple(line.pop("origin")) for line in lines} == {("name", "path", "content")}
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(first, out, vae)
    assert (report.ok, report.resumed) == (0, 2)
    report = run(second, out, vae)
    assert (report.ok, report.resumed, report.replaced, report.replaced_keys) == (2, 0, 2, ["a", "b"])


def test_replaced_rows_are_counted_and_named(tmp_path, vae):
    source, out = folder(tmp_path / "in", a=0, b=1, c=2), tmp_path / "out"
    run(source, out, vae, flip=True)
    assert store_facts(out)["superseded_rows"] == 0
    picture(9).save(source / "b.png")
    planned = run(source, out, vae, flip=True, dry_run=True)
    report = run(source, out, vae, flip=True)
    for each in (planned, report):
        assert (each.resumed, each.replaced, each.replaced_keys) == (4, 2, ["b.png"])
        assert "edited  2 rows replaced, of images that changed: b.png" in each.lines()
        assert json.loads(each.to_json())["replaced_keys"] == ["b.png"]
    assert report.ok == 2
    again = run(source, out, vae, flip=True)
    assert (again.resumed, again.replaced) == (6, 0)
    facts = store_facts(out)
    assert (facts["rows"], facts["superseded_rows"]) == (6, 2)
    assert (verify(out, progress=False).rows, verify(out, progress=False).superseded) == (8, 2)


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_a_shard_of_another_folder_is_all_that_is_encoded(tmp_path, vae, kind):
    """The places of the others change: they are relative to the folder above all of them."""
    out = tmp_path / "out"
    if kind == "tar":
        one, two = archive(tmp_path / "x" / "0.tar", a=0, b=1), archive(tmp_path / "y" / "1.tar", c=2)
    else:
        one, two = tmp_path / "x" / f"0.{kind}", tmp_path / "y" / f"1.{kind}"
        for path, seeds in ((one, {"a": 0, "b": 1}), (two, {"c": 2})):
            folder(path.parent, **seeds)
            if kind == "jsonl":
                path.write_text("".join(json.dumps({"key": name, "path": f"{name}.png"}) + "\n" for name in seeds))
            else:
                arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
                images = [(path.parent / f"{name}.png").read_bytes() for name in seeds]
                parquet.write_table(arrow.table({"key": [*seeds], "image": images}), path)
    assert run(one, out, vae).ok == 2
    report = run([one, two], out, vae)
    assert (report.ok, report.resumed, report.replaced, report.gone) == (1, 2, 0, 0)
    shard = next((out / "shards").glob("000000*.safetensors"))
    shard.write_bytes(b"damaged")
    done = repair(out, [one, two], vae=vae, device="cpu", progress=False)
    assert (done.units, done.report.failed) == ([0], 0)
    copy = tmp_path / "z" / one.name
    shutil.copytree(one.parent, copy.parent)  # with their times
    assert run([copy, two], out, vae).ok == 0


def test_a_copied_archive_is_known_by_its_content_and_a_changed_one_alone_is_encoded(tmp_path, vae):
    one, two, out = (
        archive(tmp_path / "x" / "0.tar", a=0, b=1),
        archive(tmp_path / "y" / "1.tar", c=2),
        tmp_path / "out",
    )
    run([one, two], out, vae)
    copy = tmp_path / "z" / "0.tar"
    copy.parent.mkdir()
    shutil.copyfile(one, copy)
    os.utime(copy, ns=(5, 5))
    report = run([copy, two], out, vae)
    assert (report.ok, report.resumed) == (0, 3)
    archive(two, c=5)
    report = run([one, two], out, vae)
    assert (report.ok, report.resumed, report.replaced_keys) == (1, 2, ["c"])
    os.utime(one, ns=(7, 7))  # written again, for all that is known
    assert run([one, two], out, vae).replaced_keys == ["a", "b"]


def test_with_hashes_an_image_is_the_same_wherever_it_is(tmp_path, vae):
    one, out = archive(tmp_path / "x" / "0.tar", a=0, b=1), tmp_path / "out"
    run(one, out, vae, hash="full")
    with tarfile.open(one) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    copy = tmp_path / "other.tar"
    with tarfile.open(copy, "w") as tar:
        for name in ("b", "a"):
            tar.add(tmp_path / "unpacked" / f"{name}.png", f"{name}.png")
    assert run(copy, out, vae, hash="full").ok == 0


@pytest.mark.parametrize("flip", [False, True])
def test_deleted_images_are_named_and_taken_out_only_on_request(tmp_path, vae, flip):
    source, out = folder(tmp_path / "in", a=0, b=1, c=2), tmp_path / "out"
    rows = 2 if flip else 1
    run(source, out, vae, flip=flip)
    (source / "b.png").unlink()
    report = run(source, out, vae, flip=flip)
    assert (report.ok, report.resumed, report.gone, report.gone_keys, report.pruned) == (
        0,
        3 * rows,
        rows,
        ["b.png"],
        0,
    )
    assert f"gone    {rows} rows of images that the source no longer has: b.png; they are still" in "\n".join(
        report.lines()
    )
    assert keys_of(out) == sorted([*["a.png"] * rows, *["b.png"] * rows, *["c.png"] * rows])
    before = bytes_of(out)
    report = run(source, out, vae, flip=flip, prune=True, dry_run=True)
    assert (report.pruned, report.resumed, bytes_of(out)) == (rows, 2 * rows, before)
    report = run(source, out, vae, flip=flip, prune=True)
    assert (report.resumed, report.gone, report.pruned) == (2 * rows, rows, rows)
    assert f"pruned  {rows} rows of images that the source no longer has: b.png" in report.lines()
    assert set(keys_of(out)) == {"a.png", "c.png"}
    assert {*Store.open(out).columns()} == {"a.png", "c.png"}
    facts, found = store_facts(out), verify(out, deep=True, progress=False)
    assert (facts["rows"], facts["superseded_rows"], facts["planned_rows"]) == (2 * rows, rows, 2 * rows)
    assert (found.damaged, found.stale, found.superseded) == ([], [], rows)
    again = run(source, out, vae, flip=flip, prune=True)
    assert (again.ok, again.gone, again.pruned) == (0, 0, 0)
    assert len([*(out / "plan").iterdir()]) == 2
    picture(1).save(source / "b.png")
    report = run(source, out, vae, flip=flip)
    assert (report.ok, report.replaced, len(keys_of(out))) == (rows, 0, 3 * rows)


def test_nothing_is_pruned_where_the_source_cannot_be_listed_whole(tmp_path, vae):
    path, out = archive(tmp_path / "a.tar", a=0, b=1), tmp_path / "out"
    run(path, out, vae)
    path.write_bytes(path.read_bytes()[:-10240])
    before = bytes_of(out)
    with pytest.raises(ValueError, match=r"prune needs a source .* listed whole.*a\.tar: it is cut or damaged"):
        run(path, out, vae, prune=True)
    assert bytes_of(out) == before


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"key": "other"}, False),
        ({"size": 8}, False),
        ({"mtime_ns": 10}, False),
        ({"place": "x/a.tar@512+7"}, True),
        ({"place": "xa.tar@512+7"}, False),
        ({"place": "b.tar@512+7"}, False),
        ({"place": "x/a.tar@1024+7"}, False),
        ({"mtime_ns": 10, "place": "x/a.tar@512+7", "origin": Origin("a.tar", "elsewhere", "digest")}, True),
        ({"place": "x/a.tar@1024+7", "origin": Origin("a.tar", "elsewhere", "digest")}, False),
        ({"origin": Origin("a.tar", "here", "other digest")}, True),  # written elsewhere in it, with the old mtime
        ({"origin": Origin("a.tar", "elsewhere", "other digest")}, False),
        ({"origin": Origin("a.tar", "elsewhere")}, True),
        ({"origin": None}, True),
    ],
)
def test_an_image_is_the_planned_one_by_what_is_known_of_it(change, same):
    planned = {
        "key": "a",
        "size": 7,
        "mtime_ns": 9,
        "place": "a.tar@512+7",
        "origin": Origin("a.tar", "here", "digest"),
    }
    assert SourceFile(**{**planned, **change}).is_same_as(SourceFile(**planned)) == same
    hashed = SourceFile(**{**planned, **change}, sha256="1")
    assert hashed.is_same_as(SourceFile(**planned, sha256="1")) == ("key" not in change)
    assert not hashed.is_same_as(SourceFile(**planned, sha256="2"))
