"""encode over a folder: the rows stored, their keys, and errors on the way."""

import errno
import json
import os
import threading
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.small_store import SIDE, picture, small_vae, write_pictures

import fastvae
import fastvae.system.atomic_files
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.images.crop import to_bucket
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import read_image
from fastvae.data.store.errors import IdentityMismatch, StoreError
from fastvae.data.store.store import Store

SMALL_CONFIG = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def latents(store) -> dict[str, np.ndarray]:
    return {item["key"]: np.concatenate([item["mean"], item["logvar"]]) for item in LatentDataset(store)}


def expected(vae, path) -> np.ndarray:
    """Return the moments of one file, computed by the model itself, in the dtype of the store."""
    pixels, _ = to_bucket(read_image(path, at_least=SIDE), SIDE)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        mean, logvar = vae.encode_moments(x)[0].chunk(2)
    return torch.cat([mean, logvar.clamp(-30, 20)]).half().numpy()


def assert_half_equal(stored: np.ndarray, wanted: np.ndarray) -> None:
    """Assert equality up to the order of summation: within one step of half precision at the largest value."""
    scale = np.abs(wanted.astype(np.float64)).max()
    assert np.abs(stored.astype(np.float64) - wanted.astype(np.float64)).max() <= 2 * np.finfo(np.float16).eps * scale


def test_every_row_is_its_own_files(tmp_path):
    vae = small_vae()
    names = write_pictures(tmp_path / "in", 7)
    report = encode(tmp_path / "in", tmp_path / "out", vae=vae, workers=2, **OPTIONS)
    assert (report.ok, report.failed, report.resumed, report.exceeded) == (7, 0, 0, False)
    stored = latents(tmp_path / "out")
    assert sorted(stored) == names
    for name in names:
        assert_half_equal(stored[name], expected(vae, tmp_path / "in" / name))


@pytest.fixture
def two_threads():
    """Let torch compute with two threads, so that a single worker would use both within an image."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_row_34_rows_depend_on_neither_workers_nor_neighbours(tmp_path, two_threads):
    vae, options = small_vae(), {**OPTIONS, "buckets": 64, "deterministic": True}
    write_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "002.png").write_bytes(b"spoilt")
    encode(tmp_path / "in", tmp_path / "one", vae=vae, workers=1, **options)
    encode(tmp_path / "in", tmp_path / "many", vae=vae, workers=3, shard_mb=0.002, batch=2, **options)
    one, many = latents(tmp_path / "one"), latents(tmp_path / "many")
    assert sorted(one) == sorted(many) == ["000.png", "001.png", "003.png", "004.png", "005.png"]
    for key in one:
        assert np.array_equal(one[key], many[key])


def test_row_34_equal_runs_give_equal_bytes(tmp_path):
    write_pictures(tmp_path / "in", 4)
    for name in ("a", "b"):
        encode(tmp_path / "in", tmp_path / name, vae=small_vae(), **OPTIONS)
    shards = [sorted((tmp_path / name / "shards").glob("*.safetensors")) for name in ("a", "b")]
    assert [path.name for path in shards[0]] == ["000000-32x32.safetensors"]
    assert shards[0][0].read_bytes() == shards[1][0].read_bytes()


def test_bad_files_are_quarantined_and_the_rest_is_encoded(tmp_path):
    folder = tmp_path / "in"
    good = write_pictures(folder, 3)
    whole = (folder / "000.png").read_bytes()
    bad = {
        "cut.png": (whole[: len(whole) // 2], "truncated"),
        "empty.jpg": (b"", "empty"),
        "noise.jpg": (b"\xff\xd8\xff" + b"\x13garbage" * 40, "decode_error"),
        "print.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported"),
        "text.png": (b"hello", "unsupported"),
    }
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    Image.new("RGB", (100, 2)).save(folder / "thin.png")
    os.symlink(folder / "gone", folder / "link.png")
    report = encode(folder, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.failed, report.exceeded) == (3, 7, True)
    assert sorted(latents(tmp_path / "out")) == good
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    wanted = {name: reason for name, (_, reason) in bad.items()} | {"thin.png": "too_small", "link.png": "unreadable"}
    assert {line["key"]: line["reason"] for line in lines} == wanted
    assert all(line["key"] in line["detail"] for line in lines)
    assert sum(report.reasons.values()) == 7
    # Failures are remembered: a second run does not try them again, and still counts them.
    again = encode(folder, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (again.ok, again.failed, again.resumed, again.failed_before, again.exceeded) == (0, 0, 3, 7, True)
    assert not encode(folder, tmp_path / "out", vae=small_vae(), max_failures=7, **OPTIONS).exceeded


@pytest.mark.parametrize("way", ["a bad image", "an interruption"])
def test_a_run_that_is_stopped_keeps_the_shards_that_were_complete(tmp_path, monkeypatch, way):
    write_pictures(tmp_path / "in", 5)
    vae, written = small_vae(), threading.Event()
    real = Store.commit

    def slow(store, *arguments, **facts):  # the run has failed long before the first shard is on disk
        written.wait(10)
        return real(store, *arguments, **facts)

    monkeypatch.setattr(Store, "commit", slow)
    threading.Timer(0.5, written.set).start()
    if way == "a bad image":
        (tmp_path / "in" / "002.png").write_bytes(b"")
        raised = pytest.raises(ImageError, match=r"empty: 002\.png holds no bytes")
    else:
        calls = iter(range(5))
        start = MomentEncoder.start

        def interrupted(encoder, pixels):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return start(encoder, pixels)

        monkeypatch.setattr(MomentEncoder, "start", interrupted)
        raised = pytest.raises(KeyboardInterrupt)
    with raised:
        encode(tmp_path / "in", tmp_path / "out", vae=vae, on_error="fail", workers=1, shard_mb=0.001, **OPTIONS)
    assert sorted(latents(tmp_path / "out")) == ["000.png", "001.png"]


def test_a_slow_disk_does_not_hold_the_encoder_up(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 6)
    calls, later = [], threading.Event()
    start, commit, waited = MomentEncoder.start, Store.commit, []

    def counted(encoder, pixels):
        calls.append(1)
        if len(calls) == 4:
            later.set()
        return start(encoder, pixels)

    def slow(store, *arguments, **facts):
        # One worker is three images ahead of a main thread that waits for a write, and four ahead of one that does not.
        waited.append(later.wait(5))
        return commit(store, *arguments, **facts)

    monkeypatch.setattr(MomentEncoder, "start", counted)
    monkeypatch.setattr(Store, "commit", slow)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), workers=1, shard_mb=0.0001, **OPTIONS)
    assert waited == [True] * 6


def test_row_06_every_orientation_gives_the_same_latents(tmp_path):
    (tmp_path / "in").mkdir()
    upright = picture(5, 56, 40)
    turned = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
        1: [],
    }
    for orientation, steps in turned.items():
        image = upright
        for step in steps:
            image = image.transpose(step)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "in" / f"{orientation}.png", exif=exif)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    items = list(LatentDataset(tmp_path / "out"))
    assert len(items) == 8
    for item in items:
        assert torch.equal(item["mean"], items[0]["mean"])
        assert torch.equal(item["logvar"], items[0]["logvar"])
        assert item["original_hw"].tolist() == [40, 56]
        assert item["crop_tlhw"].tolist() == [0, 6, 32, 32]  # 56 * 32 / 40 = 44.8 -> 45 wide, (45 - 32) // 2


def test_row_26_new_and_edited_files_are_added_without_renumbering(tmp_path):
    vae, folder, out = small_vae(), tmp_path / "in", tmp_path / "out"
    write_pictures(folder, 3)
    encode(folder, out, vae=vae, **OPTIONS)
    before = (out / "shards" / "000000-32x32.safetensors").read_bytes()
    picture(50).save(folder / "000-first.png")
    picture(51, 60, 44).save(folder / "001.png")
    report = encode(folder, out, vae=vae, **OPTIONS)
    assert (report.ok, report.resumed) == (2, 3)
    assert (out / "plan" / "units-00001.jsonl").exists()
    assert (out / "shards" / "000000-32x32.safetensors").read_bytes() == before
    stored = latents(out)
    assert sorted(stored) == ["000-first.png", "000.png", "001.png", "002.png"]
    for key in stored:
        assert_half_equal(stored[key], expected(vae, folder / key))
    # Edited into something unreadable: the old latent must not be served under its key.
    (folder / "001.png").write_bytes(b"spoilt")
    encode(folder, out, vae=vae, **OPTIONS)
    assert sorted(latents(out)) == ["000-first.png", "000.png", "002.png"]


def test_limit_takes_the_first_and_a_later_run_the_rest(tmp_path):
    names = write_pictures(tmp_path / "in", 5)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), limit=2, **OPTIONS)
    assert sorted(latents(tmp_path / "out")) == names[:2]
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.resumed) == (3, 2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vae": small_vae(1)}, "model.encoder_weights_sha256"),
        ({"vae": small_vae(0, scaling_factor=0.5)}, "model.config.scaling_factor"),
        ({"dtype": "bf16"}, "numerics.dtype"),
        ({"posterior": "mean"}, "numerics.posterior"),
        ({"store_dtype": "fp32"}, "numerics.mean"),
        ({"buckets": 64}, "preprocess.buckets"),
        ({"alpha": "drop"}, "preprocess.alpha"),
        ({"alpha": "mask"}, "preprocess.alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_25_another_identity_is_refused_field_by_field(tmp_path, change, field):
    write_pictures(tmp_path / "in", 1)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(IdentityMismatch, match=field):
        encode(tmp_path / "in", tmp_path / "out", **({"vae": small_vae()} | OPTIONS | change))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


def test_a_run_without_a_dtype_continues_the_stores(tmp_path):
    write_pictures(tmp_path / "in", 2)
    options = {**OPTIONS, "dtype": None}
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), limit=1, **OPTIONS)
    assert encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **options).dtype == "fp32"


@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_states_its_error_over_the_first_batch_that_can_be_read(tmp_path, batch):
    names = write_pictures(tmp_path / "in", 5)
    if batch == 1:
        (tmp_path / "in" / names.pop(0)).write_bytes(b"spoilt")
    for dtype in ("fp32", "bf16"):
        options = {**OPTIONS, "dtype": dtype, "batch": batch, "store_dtype": "fp32", "workers": 1}
        report = encode(tmp_path / "in", tmp_path / dtype, vae=small_vae(), **options)
    exact, rounded = (
        np.stack([latents(tmp_path / dtype)[name][:4] for name in names[:batch]]).astype(np.float64)
        for dtype in ("fp32", "bf16")
    )
    measured = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert measured > 0
    # The report sums in fp32: at most one step of it for each of the values.
    assert abs(measured - report.dtype_error) <= exact.size * np.finfo(np.float32).eps


FAMILIES = {
    "AutoencoderKL": {},
    "AutoencoderKLFlux2": {"latent_channels": 8, "layers_per_block": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_own_model_gives_the_same_store(tmp_path, family):
    """The same weights in either class: equal rows and one identity, so each may continue the other's store."""
    names = write_pictures(tmp_path / "in", 3)
    config = {key: small_vae().config[key] for key in SMALL_CONFIG} | FAMILIES[family]
    torch.manual_seed(0)
    theirs = getattr(diffusers, family)(**config).eval()
    ours = getattr(fastvae, family)(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    encode(tmp_path / "in", tmp_path / "theirs", vae=theirs, **OPTIONS)
    encode(tmp_path / "in", tmp_path / "ours", vae=ours, limit=2, **OPTIONS)
    report = encode(tmp_path / "in", tmp_path / "ours", vae=theirs, **OPTIONS)
    assert (report.ok, report.resumed) == (1, 2)
    ours_rows, their_rows = latents(tmp_path / "ours"), latents(tmp_path / "theirs")
    assert sorted(their_rows) == names
    for name in names:
        assert np.array_equal(ours_rows[name], their_rows[name])
    # Against the model, called by its own methods.
    pixels, _ = to_bucket(read_image(tmp_path / "in" / names[0], at_least=SIDE), SIDE)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        posterior = theirs.encode(x).latent_dist
    assert_half_equal(their_rows[names[0]], torch.cat([posterior.mean[0], posterior.logvar[0]]).numpy())
    if family == "AutoencoderKLFlux2":
        with pytest.raises(StoreError, match=r"pass what is sampled through fastvae\.scale_latents"):
            LatentDataset(tmp_path / "theirs", scaled=True)


def test_weights_in_half_precision_are_the_same_model_as_their_file(tmp_path):
    write_pictures(tmp_path / "in", 2)
    vae = small_vae().bfloat16()
    vae.save_pretrained(tmp_path / "model")
    encode(tmp_path / "in", tmp_path / "out", vae=vae, limit=1, **OPTIONS)
    report = encode(tmp_path / "in", tmp_path / "out", vae=tmp_path / "model", **OPTIONS)
    assert (report.ok, report.resumed) == (1, 1)


class Poisoned(torch.nn.Module):
    """A conv_in whose output is NaN where the first pixel is black: in half precision only, or always."""

    def __init__(self, convolution, always):
        super().__init__()
        self.convolution, self.always = convolution, always
        self.weight = convolution.weight

    def forward(self, x):
        result = self.convolution(x)
        black = (x[:, :, 0, 0].float() < -0.99).all(1)
        if self.always or x.dtype != torch.float32:
            result = torch.where(black[:, None, None, None], torch.full_like(result, float("nan")), result)
        return result


@pytest.mark.parametrize("always", [False, True], ids=["in half precision", "always"])
def test_row_19_rows_that_are_not_finite_are_redone_and_else_quarantined(tmp_path, always):
    names = write_pictures(tmp_path / "in", 4)
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / names[2])
    vae = small_vae()
    vae.encoder.conv_in = Poisoned(vae.encoder.conv_in, always)
    options = {**OPTIONS, "dtype": "bf16"}
    report = encode(tmp_path / "in", tmp_path / "out", vae=vae, batch=4, **options)
    assert report.redone_fp32 == 1
    assert np.isfinite(report.dtype_error)  # of the other three
    stored = latents(tmp_path / "out")
    assert all(np.isfinite(value).all() for value in stored.values())
    if always:
        assert report.reasons == {"non_finite": 1}
        assert sorted(stored) == [names[0], names[1], names[3]]
    else:
        assert report.failed == 0
        with torch.no_grad():
            assert_half_equal(stored[names[2]], expected(vae, tmp_path / "in" / names[2]))


def test_a_mean_beyond_half_precision_is_refused_or_stored_in_single(tmp_path):
    write_pictures(tmp_path / "in", 2)
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.bias[:4] = 70_000.0  # fp16 ends at 65504
        vae.quant_conv.bias[4:] = 90.0
    report = encode(tmp_path / "in", tmp_path / "half", vae=vae, **OPTIONS)
    assert report.reasons == {"overflow": 2}
    with pytest.raises(StoreError, match="holds no committed latents"):
        LatentDataset(tmp_path / "half")
    encode(tmp_path / "in", tmp_path / "single", vae=vae, store_dtype="fp32", **OPTIONS)
    item = LatentDataset(tmp_path / "single")[0]
    assert item["mean"].dtype == torch.float32
    assert item["mean"].min() > 65_504
    assert (item["logvar"] == 20).all()  # clamped, as the posterior clamps it


def test_row_15_a_full_disk_leaves_the_committed_shards(tmp_path, monkeypatch):
    names = write_pictures(tmp_path / "in", 6)
    calls = {"left": 11}  # store.json, its folders, plan, shard, record: two calls each, then one, and the disk is full
    real = os.fsync

    def full(descriptor):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with (
        monkeypatch.context() as patch
    ):  # undo() would undo the conftest's patches as well, and enable the slow interpreter
        patch.setattr(fastvae.system.atomic_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), shard_mb=0.002, **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert len(Store.open(tmp_path / "out").commits()) == 1
    assert not list((tmp_path / "out").rglob("*.tmp.*"))
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), shard_mb=0.002, **OPTIONS)
    assert report.ok + report.resumed == 6
    assert report.resumed > 0
    assert sorted(latents(tmp_path / "out")) == names


def test_row_15_too_little_room_is_reported_before_encoding(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match="are needed and 100 are free") as caught:
        encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_thread_is_raised_and_the_threads_setting_comes_back(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 4)
    vae = small_vae()
    vae.encoder.conv_in.register_forward_hook(lambda module, args, out: 1 / 0)
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        encode(tmp_path / "in", tmp_path / "out", vae=vae, workers=2, **OPTIONS)
    assert torch.get_num_threads() == threads


def test_the_callers_model_is_left_alone(tmp_path):
    write_pictures(tmp_path / "in", 1)
    vae = small_vae()
    weight = vae.encoder.conv_in.weight
    before = weight.clone()
    encode(tmp_path / "in", tmp_path / "out", vae=vae, **{**OPTIONS, "dtype": "bf16"})
    assert vae.decoder is not None
    assert vae.encoder.conv_in.weight is weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, before)


def test_another_folders_rows_are_not_mixed_in(tmp_path):
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "other").mkdir()
    picture(9).save(tmp_path / "other" / "another.png")
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    with pytest.raises(ValueError, match="was made from another folder"):
        encode(tmp_path / "other", tmp_path / "out", vae=small_vae(), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"posterior": "draw"}, "posterior must be one of 'dist', 'mean', 'sample', got 'draw'"),
        ({"crop": "left"}, "crop must be one of 'centre', 'random', got 'left'"),
        ({"logvar": "fp32"}, "logvar must be one of 'fp16', 'u8', got 'fp32'"),
        ({"variants": 0}, "variants must be from 1 to 32768, got 0"),
        ({"variants": 2}, "variants must be 1 with crop='centre'"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"buckets": 30}, "buckets must be a multiple"),
        ({"batch": 0}, "batch must be 'auto' or at least 1, got 0"),
        ({"workers": "many"}, "workers must be"),
        ({"shard_mb": 0}, "shard_mb must be above 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
        ({"max_failures": "-1%"}, "max_failures must be"),
        ({"max_failures": "nan%"}, "max_failures must be"),
        ({"vae": torch.nn.Linear(1, 1)}, "vae must have a config and an encoder"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_are_refused(tmp_path, change, words):
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=words):
        encode(tmp_path / "in", tmp_path / "out", **({"vae": small_vae()} | OPTIONS | change))


def test_the_output_is_not_the_source_nor_a_folder_of_other_things(tmp_path):
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="out must be another folder than src"):
        encode(tmp_path / "in", tmp_path / "in", vae=small_vae(), **OPTIONS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(StoreError, match="neither empty nor a latent store"):
        encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)


def test_a_store_that_another_process_makes_during_the_check_is_joined(tmp_path, monkeypatch):
    """Several processes may start on a new output at once: store.json appears between two looks at the folder."""
    write_pictures(tmp_path / "in", 2)
    options = {"vae": small_vae(), "buckets": SIDE, "dtype": "fp32", "device": "cpu", "progress": False}
    encode(tmp_path / "in", tmp_path / "out", **options)
    (tmp_path / "out" / "store.json").rename(tmp_path / "store.json")
    real = Path.iterdir

    def iterdir(path):
        if path == tmp_path / "out" and (tmp_path / "store.json").exists():
            (tmp_path / "store.json").rename(path / "store.json")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert encode(tmp_path / "in", tmp_path / "out", **options).resumed == 2
