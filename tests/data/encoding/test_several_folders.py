"""Several folders, patterns and URLs in one call of encode."""

import json
import os

import pytest
from support.small_store import picture, small_vae

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.sources.open import open_source
from fastvae.data.store.store import Store

OPTIONS = {"buckets": 32, "dtype": "fp32", "progress": False, "device": "cpu", "workers": 1}
TIME = 1_700_000_000 * 10**9


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def folder(path, suffix=".bmp", **seeds):
    """Write a picture of each seed, all of one size in bytes and one time, as of an unpacked archive."""
    path.mkdir(parents=True, exist_ok=True)
    for name, seed in seeds.items():
        picture(seed).save(path / f"{name}{suffix}")
        os.utime(path / f"{name}{suffix}", ns=(TIME, TIME))
    return path


def run(src, out, vae, **options):
    return encode(src, out, vae=vae, **{**OPTIONS, **options})


def images_of(src, **options):
    """Return the pixels of each key, by the images' places."""
    source = open_source(src, **options)
    return {file.key: source.read(file) for file in source.listing().files}


def test_images_of_several_folders_are_rows_and_equal_keys_are_kept_apart(tmp_path, vae):
    one, two = folder(tmp_path / "one", a=0, b=1), folder(tmp_path / "two", a=2, c=3)
    report = run([one, two], tmp_path / "out", vae)
    assert (report.ok, json.loads(report.to_json())["duplicate_keys"]) == (4, 1)
    planned = Store.open(tmp_path / "out").planned_files()
    assert {key: (file.origin.name, file.place) for key, file in planned.items()} == {
        "a.bmp": ("one", ""),
        "a.bmp~2": ("two", "a.bmp"),
        "b.bmp": ("one", ""),
        "c.bmp": ("two", ""),
    }
    assert images_of([one, two]) == {
        "a.bmp": one / "a.bmp",
        "a.bmp~2": two / "a.bmp",
        "b.bmp": one / "b.bmp",
        "c.bmp": two / "c.bmp",
    }


def test_each_image_keeps_its_key_whatever_the_order_of_the_folders(tmp_path, vae):
    """Also where size and time of two images are equal, and their pixels are not."""
    one, two, out = folder(tmp_path / "one", a=0, b=1), folder(tmp_path / "two", a=2, c=3), tmp_path / "out"
    assert run(one, out, vae).ok == 2
    assert run([two, one], out, vae).ok == 2
    places = {key: (file.origin.name, file.place) for key, file in Store.open(out).planned_files().items()}
    assert places["a.bmp"] == ("one", "")
    assert places["a.bmp~2"] == ("two", "a.bmp")
    for src, gone in (([one, two], 0), ([two, one], 0), ([f"{two}/*.bmp", one], 0), (one, 2), ([one, one], 2)):
        report = run(src, out, vae)
        assert (report.ok, report.resumed, report.replaced, report.gone) == (0, 4, 0, gone), src
    folder(two, a=9)
    os.utime(two / "a.bmp", ns=(TIME + 1, TIME + 1))
    report = run([two, one], out, vae)
    assert (report.ok, report.replaced_keys) == (1, ["a.bmp~2"])


def test_a_key_with_a_place_is_repaired_from_its_own_folder(tmp_path, vae):
    one, two, out = folder(tmp_path / "one", a=0), folder(tmp_path / "two", a=2), tmp_path / "out"
    run([one, two], out, vae)
    (shard,) = (out / "shards").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    repair(out, [two, one], vae=vae, progress=False, device="cpu")
    assert shard.read_bytes() == whole


def test_pruning_takes_out_the_deleted_images_of_each_origin(tmp_path, vae):
    one, two, out = folder(tmp_path / "one", a=0, b=1), folder(tmp_path / "two", a=2, c=3), tmp_path / "out"
    run([one, two], out, vae)
    (one / "b.bmp").unlink()
    (two / "a.bmp").unlink()
    report = json.loads(run([one, two], out, vae).to_json())
    assert (report["gone"], report["pruned"], report["resumed"]) == (2, 0, 4)
    assert sorted(report["gone_keys"]) == ["a.bmp~2", "b.bmp"]
    report = json.loads(run([two, one], out, vae, prune=True).to_json())
    assert (report["pruned"], report["resumed"]) == (2, 2)
    assert sorted(key for key, _ in Store.open(out).resolve()) == ["a.bmp", "c.bmp"]


def test_captions_counts_and_notes_of_each_folder_ride_along(tmp_path, vae):
    one, two = folder(tmp_path / "one", a=0), folder(tmp_path / "two", a=2)
    (one / "a.txt").write_text("of one")
    (two / "a.txt").write_text("of two")
    (two / "metadata.jsonl").write_text("no JSON\n")
    folder(two / "@eaDir", thumbnail=5)
    report = run([one, two], tmp_path / "out", vae)
    assert Store.open(tmp_path / "out").columns() == {"a.bmp": {"txt": "of one"}, "a.bmp~2": {"txt": "of two"}}
    assert (report.ignored_files, report.passed_over) == (3, {"@eaDir": 1})
    (note,) = report.notes
    assert note.startswith(f"{two}: 1 captions of metadata.jsonl have no file_name")


def test_a_folder_and_a_url_together(tmp_path):
    memory = pytest.importorskip("fsspec", reason="fsspec is not installed").filesystem("memory")
    folder(tmp_path / "one", a=0)
    memory.pipe("/several/a.bmp", (tmp_path / "one" / "a.bmp").read_bytes())
    found = images_of([tmp_path / "one", "memory://several"])
    assert found == {"a.bmp": tmp_path / "one" / "a.bmp", "a.bmp~2": (tmp_path / "one" / "a.bmp").read_bytes()}


def test_one_of_the_folders_as_the_output_and_an_empty_one_are_refused(tmp_path, vae):
    one = folder(tmp_path / "one", a=0)
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="out must be another folder than src"):
        run([one, tmp_path / "two"], tmp_path / "two", vae)
    with pytest.raises(ValueError, match=r"there is none under '.*two'"):
        run([one, tmp_path / "two"], tmp_path / "out", vae)
