"""Plans and the rows made from them: buckets, variants, stored fields, and rows that are never mixed up."""

import contextlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from support.small_store import picture, small_vae

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, to_bucket
from fastvae.data.images.read import read_image
from fastvae.data.rows import noise_key, size_name
from fastvae.data.store.errors import IdentityMismatch, StoreError
from fastvae.data.store.shard import read_names, row_checksum
from fastvae.data.store.store import Store
from fastvae.latents.cpu_sampling import draw

OPTIONS = {"buckets": "sdxl@64", "dtype": "fp32", "progress": False, "device": "cpu", "shard_mb": 0.004, "workers": 1}
TABLE = Buckets.parse("sdxl@64", 8)
SIZES = ((60, 60), (90, 40), (40, 90), (64, 48), (120, 30), (33, 200))


def write_sizes(folder, sizes=SIZES):
    """Write a picture of each (width, height), by key."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [f"{number:02d}.png" for number in range(len(sizes))]
    for number, (key, (width, height)) in enumerate(zip(keys, sizes, strict=True)):
        picture(number, width, height).save(folder / key)
    return keys


def rows_of(out) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Return every row that the store serves: its tensors, and the bucket in its shard's name."""
    shards, rows = {}, {}
    for name, (shard, row) in Store.open(out).resolve().items():
        if shard not in shards:
            shards[shard] = (load_file(out / "shards" / shard), read_names(out / "shards" / shard))
        tensors, names = shards[shard]
        assert names[row] == name
        kept = {part: array[row] for part, array in tensors.items() if not part.startswith("key_")}
        rows[name] = {**kept, "bucket": shard.rsplit("-", 1)[1].removesuffix(".safetensors")}
    return rows


def moments(vae, path, bucket, variants=Variants(), variant=0, key=""):  # noqa: B008 (frozen)
    """Return mean and clamped log-variance of one variant of one file, encoded alone."""
    pixels, crop = to_bucket(read_image(path, at_least=bucket), bucket, variants, variant, key)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        mean, logvar = vae.encode_moments(x)[0].chunk(2)
    return mean.numpy(), logvar.clamp(-30, 20).numpy(), crop


def assert_half_equal(stored, wanted):
    """Assert equality up to the order of summation: within one step of half precision at the largest value."""
    scale = np.abs(wanted.astype(np.float64)).max()
    assert np.abs(stored.astype(np.float64) - wanted).max() <= 2 * np.finfo(np.float16).eps * scale


def plan_lines(out):
    return [json.loads(line) for path in sorted((out / "plan").iterdir()) for line in path.read_text().splitlines()]


def test_every_row_is_its_own_image_in_the_nearest_bucket(tmp_path):
    vae, keys = small_vae(), write_sizes(tmp_path / "in", SIZES + SIZES[::-1])
    report = encode(tmp_path / "in", tmp_path / "out", vae=vae, **OPTIONS)
    assert (report.ok, report.failed) == (len(keys), 0)
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == [(key, 0) for key in keys]
    for (key, _), row in rows.items():
        with Image.open(tmp_path / "in" / key) as image:
            original = (image.height, image.width)
        bucket = TABLE.nearest(original)
        assert row["bucket"] == size_name(bucket)
        assert row["original_hw"].tolist() == list(original)
        mean, logvar, crop = moments(vae, tmp_path / "in" / key, bucket)
        assert row["crop_tlhw"].tolist() == list(crop)
        assert_half_equal(row["mean"], mean)
        assert_half_equal(row["logvar"], logvar)
    assert len({row["bucket"] for row in rows.values()}) > 3
    facts = json.loads((tmp_path / "out" / "store.json").read_text())
    assert facts["buckets"] == TABLE.names


def test_the_plan_has_bucket_and_size_of_each_row(tmp_path):
    keys = write_sizes(tmp_path / "in")
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), flip=True, **OPTIONS)
    lines = plan_lines(tmp_path / "out")
    assert sorted((line["key"], line["variant"]) for line in lines) == [(key, v) for key in keys for v in (0, 1)]
    for line in lines:
        status = (tmp_path / "in" / line["key"]).stat()
        assert (line["size"], line["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        width, height = SIZES[keys.index(line["key"])]
        assert (line["height"], line["width"]) == (height, width)
        assert line["bucket"] == size_name(TABLE.nearest((height, width)))
    of_unit = {line["unit"]: line["bucket"] for line in lines}
    assert all(of_unit[line["unit"]] == line["bucket"] for line in lines)
    shards = {path.stem for path in (tmp_path / "out" / "shards").glob("*.safetensors")}
    assert shards == {f"{unit:06d}-{bucket}" for unit, bucket in of_unit.items()}


def test_an_image_whose_header_is_bad_is_quarantined_in_its_unit(tmp_path):
    keys = write_sizes(tmp_path / "in")
    (tmp_path / "in" / keys[1]).write_bytes(b"no header")
    Image.new("RGB", (400, 9)).save(tmp_path / "in" / keys[2])
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert report.reasons == {"unsupported": 1, "too_thin": 1}
    lines = {line["key"]: line for line in plan_lines(tmp_path / "out")}
    assert (lines[keys[1]]["height"], lines[keys[1]]["bucket"]) == (0, TABLE.names[0])
    assert len(rows_of(tmp_path / "out")) == len(keys) - 2


def test_an_image_that_changes_its_bucket_under_the_run_is_left_to_the_next(tmp_path, monkeypatch):
    keys, out = write_sizes(tmp_path / "in"), tmp_path / "out"
    real = MomentEncoder.__init__

    def turned(*arguments):  # after the plan, before the pixels
        picture(0, 60, 200).save(tmp_path / "in" / keys[1])
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MomentEncoder, "__init__", turned)
        report = encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS)
    assert report.reasons == {"unreadable": 1}
    assert (keys[1], 0) not in rows_of(out)
    assert encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS).ok == 1
    assert rows_of(out)[keys[1], 0]["original_hw"].tolist() == [200, 60]


def test_row_14_keys_that_differ_only_by_folder_or_extension_stay_apart(tmp_path):
    vae, folder = small_vae(), tmp_path / "in"
    for number, key in enumerate(("a.png", "a.webp", "b/a.png", "b.a.png")):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / key, lossless=True)
    encode(folder, tmp_path / "out", vae=vae, **OPTIONS)
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == [("a.png", 0), ("a.webp", 0), ("b.a.png", 0), ("b/a.png", 0)]
    for (key, _), row in rows.items():
        assert_half_equal(row["mean"], moments(vae, folder / key, TABLE.nearest((40, 48)))[0])
    assert len({row["mean"].tobytes() for row in rows.values()}) == 4


def test_row_26_an_edited_images_old_latent_is_not_served_from_the_plan_on(tmp_path, monkeypatch):
    keys, out = write_sizes(tmp_path / "in"), tmp_path / "out"
    encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS)
    picture(99, 61, 60).save(tmp_path / "in" / keys[0])

    def interrupt(encoder, pixels):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MomentEncoder, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS)
    assert sorted(rows_of(out)) == [(key, 0) for key in keys[1:]]
    assert encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS).ok == 1
    mean, _, _ = moments(small_vae(), tmp_path / "in" / keys[0], TABLE.nearest((60, 61)))
    assert_half_equal(rows_of(out)[keys[0], 0]["mean"], mean)


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_variants_are_encoded_and_not_computed(tmp_path, crop):
    vae, keys = small_vae(), write_sizes(tmp_path / "in")
    crops = 2 if crop == "random" else 1
    encode(tmp_path / "in", tmp_path / "out", vae=vae, crop=crop, variants=crops, flip=True, seed=3, **OPTIONS)
    rows, variants = rows_of(tmp_path / "out"), Variants(crop, crops, True, 3)
    assert sorted(rows) == [(key, variant) for key in keys for variant in range(2 * crops)]
    for (key, variant), row in rows.items():
        assert row["variant"] == variant
        height, width = row["original_hw"].tolist()
        mean, _, where = moments(vae, tmp_path / "in" / key, TABLE.nearest((height, width)), variants, variant, key)
        assert row["crop_tlhw"].tolist() == list(where)
        assert_half_equal(row["mean"], mean)
    plain, mirrored = rows[keys[0], 0]["mean"], rows[keys[0], 1]["mean"]
    assert not np.array_equal(mirrored, plain[:, :, ::-1])  # a mirrored latent is not the latent of the mirrored image


def test_one_draw_is_the_posteriors_by_its_own_noise_key(tmp_path):
    write_sizes(tmp_path / "in")
    for posterior in ("dist", "sample"):
        options = {**OPTIONS, "store_dtype": "fp32", "posterior": posterior, "seed": 5}
        encode(tmp_path / "in", tmp_path / posterior, vae=small_vae(), flip=True, **options)
    moments_of, drawn = rows_of(tmp_path / "dist"), rows_of(tmp_path / "sample")
    assert drawn.keys() == moments_of.keys()
    for (key, variant), row in drawn.items():
        assert "logvar" not in row
        mean, logvar = (torch.from_numpy(moments_of[key, variant][name])[None] for name in ("mean", "logvar"))
        wanted = draw(mean, logvar.float(), [noise_key(5, 0, key, variant)])[0].numpy()
        noise = np.abs(wanted - mean[0].numpy()).max()
        # The stored log-variance is rounded to half precision: half a step of it in the exponent.
        rounding = np.finfo(np.float16).eps * np.abs(logvar.numpy()).max() / 4
        assert 0 < np.abs(row["mean"] - wanted).max() <= 2 * rounding * noise + 1e-6 * np.abs(wanted).max()


def test_log_variances_in_eight_bits_are_within_half_a_level(tmp_path):
    write_sizes(tmp_path / "in")
    for logvar in ("fp16", "u8"):
        encode(tmp_path / "in", tmp_path / logvar, vae=small_vae(), logvar=logvar, **OPTIONS)
    exact, rounded = rows_of(tmp_path / "fp16"), rows_of(tmp_path / "u8")
    for name, row in rounded.items():
        assert (row["logvar"].dtype, row["logvar_range"].dtype) == (np.uint8, np.float32)
        least, greatest = row["logvar_range"].astype(np.float64)
        wanted = exact[name]["logvar"].astype(np.float64)
        error = np.abs(least + row["logvar"] / 255 * (greatest - least) - wanted).max()
        half_step = np.spacing(np.abs(exact[name]["logvar"]).max()).astype(np.float64)
        assert 0 < error <= (greatest - least) / 510 + half_step
        assert (row["logvar"].min(), row["logvar"].max()) == (0, 255)
        assert row["row_crc32"] == row_checksum(row["mean"], row["logvar"], row["logvar_range"])
    sizes = [Store.open(tmp_path / logvar).commits()[0].bytes for logvar in ("fp16", "u8")]
    assert sizes[1] < sizes[0]


BASE = {"crop": "random", "variants": 2, "posterior": "sample"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"buckets": "flux@64"}, "preprocess.buckets"),
        ({"crop": "centre", "variants": 1}, "preprocess.crop"),
        ({"variants": 3}, "preprocess.variants"),
        ({"flip": True}, "preprocess.flip"),
        ({"seed": 1}, "preprocess.crop"),
        ({"seed": 1, "crop": "centre", "variants": 1}, "numerics.noise"),
        ({"posterior": "dist", "logvar": "u8"}, "numerics.logvar"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_25_other_rows_of_an_image_are_another_identity(tmp_path, change, field):
    write_sizes(tmp_path / "in", SIZES[:1])
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS | BASE)
    with pytest.raises(IdentityMismatch, match=field):
        encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS | BASE | change)


def test_columns_ride_along_and_new_ones_need_no_unit(tmp_path):
    keys = write_sizes(tmp_path / "in", SIZES[:3])
    manifest, out = tmp_path / "list.jsonl", tmp_path / "out"

    def tell(*captions):
        lines = [{"key": f"k{n}", "image": f"in/{key}", "caption": captions[n]} for n, key in enumerate(keys)]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

    tell("one", "two", "three")
    encode(manifest, out, vae=small_vae(), **OPTIONS)
    assert {key: columns["caption"] for key, columns in Store.open(out).columns().items()} == {
        "k0": "one", "k1": "two", "k2": "three",
    }  # fmt: skip
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    tell("one", "zwei", "three")
    report = encode(manifest, out, vae=small_vae(), **OPTIONS)
    assert (report.ok, report.resumed) == (0, 3)
    assert Store.open(out).columns()["k1"]["caption"] == "zwei"
    assert Store.open(out).columns()["k2"]["caption"] == "three"
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == before
    encode(manifest, out, vae=small_vae(), **OPTIONS)
    assert len(list((out / "plan").iterdir())) == 2
    picture(9).save(tmp_path / "in" / keys[2])
    manifest.write_text(json.dumps({"key": "k2", "image": f"in/{keys[2]}"}) + "\n")
    assert encode(manifest, out, vae=small_vae(), **OPTIONS).ok == 1
    assert "caption" not in Store.open(out).columns()["k2"]  # of another picture


def test_a_dry_run_plans_and_writes_nothing(tmp_path):
    keys, out = write_sizes(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    report = encode(tmp_path / "in", out, vae=small_vae(), flip=True, dry_run=True, **OPTIONS)
    assert not out.exists()
    assert sum(report.planned.values()) == 2 * len(keys) + 2
    assert report.unreadable_headers == 2
    encode(tmp_path / "in", out, vae=small_vae(), flip=True, limit=2, **OPTIONS)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    report = encode(tmp_path / "in", out, vae=small_vae(), flip=True, dry_run=True, **OPTIONS)
    assert (report.resumed, sum(report.planned.values())) == (4, 2 * len(keys) - 2)
    assert report.planned_bytes > 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert "nothing was written" in report.lines()[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Pictures, and the mean of each variant, plain and mirrored, encoded alone."""
    folder = tmp_path_factory.mktemp("alone")
    vae, sizes = small_vae(), SIZES + SIZES[:2]
    keys, kinds = write_sizes(folder, sizes), Variants(flip=True)
    return folder, {
        (key, variant): moments(vae, folder / key, TABLE.nearest(size[::-1]), kinds, variant, key)[0]
        for key, size in zip(keys, sizes, strict=True)
        for variant in (0, 1)
    }


def encode_until(stop, monkeypatch, *arguments, **options) -> None:
    """Encode, interrupted at step ``stop``; a run of fewer steps ends."""
    real, calls = MomentEncoder.start, iter(range(100))

    def interrupted(encoder, pixels):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return real(encoder, pixels)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(MomentEncoder, "start", interrupted)
        encode(*arguments, **options)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_never_mixed_up(tmp_path, monkeypatch, alone, data):
    """Pictures in any order and under any name, some twice, broken or exchanged; interrupted runs, then a whole one."""
    folder, means = alone
    pictures = sorted({key for key, _ in means})
    chosen = data.draw(st.lists(st.sampled_from(pictures), min_size=1, max_size=6), label="pictures")
    numbers = st.integers(0, len(chosen) - 1)
    spoilt = data.draw(st.sets(numbers, max_size=2), label="spoilt")
    stops = data.draw(st.lists(st.integers(0, 2 * len(chosen)), max_size=3), label="interruptions")
    exchanged = data.draw(st.none() | st.tuples(numbers, st.sampled_from(pictures)), label="exchanged before the last")
    kinds = Variants(flip=data.draw(st.booleans(), label="mirrored as well"))
    options = {**OPTIONS, "shard_mb": data.draw(st.sampled_from([0.0005, 0.004])), "max_failures": 12}
    options |= {"batch": data.draw(st.integers(1, 3)), "workers": data.draw(st.integers(1, 2)), "flip": kinds.flip}
    for place in ("in", "out"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
    (tmp_path / "in").mkdir()
    names = [f"{len(chosen) - number}.png" for number in range(len(chosen))]
    for number, (name, key) in enumerate(zip(names, chosen, strict=True)):
        content = (folder / key).read_bytes()
        (tmp_path / "in" / name).write_bytes(content[:-20] if number in spoilt else content)
    for stop in stops:
        encode_until(stop, monkeypatch, tmp_path / "in", tmp_path / "out", vae=small_vae(), **options)
    good = {name: key for number, (name, key) in enumerate(zip(names, chosen, strict=True)) if number not in spoilt}
    if exchanged is not None:
        name = names[exchanged[0]]
        good[name] = exchanged[1]
        (tmp_path / "in" / name).write_bytes((folder / exchanged[1]).read_bytes())
        os.utime(tmp_path / "in" / name, ns=(10**9, 10**9))
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **options)
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == sorted((name, variant) for name in good for variant in range(kinds.count))
    assert sum(report.reasons.values()) == kinds.count * (len(chosen) - len(good))
    for (name, variant), row in rows.items():
        assert_half_equal(row["mean"], means[good[name], variant])


def test_a_store_keeps_the_tar_rule_that_it_was_made_with(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, seed in (("0001.image.png", 0), ("0002.image.png", 1)):
            picture(seed).save(tmp_path / "member.png")
            tar.add(tmp_path / "member.png", name)
    encode(tmp_path / "a.tar", tmp_path / "new", vae=small_vae(), **OPTIONS)
    assert [key for key, _ in rows_of(tmp_path / "new")] == ["0001", "0002"]
    facts = json.loads((tmp_path / "new" / "store.json").read_text())
    assert facts["tar_keys"] == "webdataset"
    (tmp_path / "old").mkdir()
    del facts["tar_keys"]
    (tmp_path / "old" / "store.json").write_text(json.dumps(facts))
    report = encode(tmp_path / "a.tar", tmp_path / "old", vae=small_vae(), **OPTIONS)
    assert report.identity == facts["identity_digest"]
    assert [key for key, _ in rows_of(tmp_path / "old")] == ["0001.image", "0002.image"]
    assert "tar_keys" not in json.loads((tmp_path / "old" / "store.json").read_text())
    facts["tar_keys"] = "third dot"
    (tmp_path / "new" / "store.json").write_text(json.dumps(facts))
    with pytest.raises(StoreError, match="a rule for keys of tar members that is not known here: 'third dot'"):
        encode(tmp_path / "a.tar", tmp_path / "new", vae=small_vae(), **OPTIONS)
