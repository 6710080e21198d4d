"""What a hostile tester broke once: models, folders, locks and consoles that a run must take or refuse in words."""

import errno
import json
import os
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.small_store import SIDE, picture, small_vae, write_pictures

import fastvae
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.decoding.decode import decode
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.sources.folder import list_folder
from fastvae.data.store.errors import IdentityMismatch, StoreError, StoreLocked
from fastvae.data.store.lock import locked
from fastvae.data.store.store import Store
from fastvae.system.atomic_files import write_atomically
from fastvae.system.strict_json import strict_json

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def means(store) -> dict[str, np.ndarray]:
    return {item["key"]: item["mean"].clone().numpy() for item in LatentDataset(store)}


@pytest.fixture
def source(tmp_path):
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


# Models


def test_tiling_and_slicing_are_the_callers_and_change_no_latent(source, tmp_path):
    vae = small_vae(sample_size=16)
    encode(source, tmp_path / "plain", vae=vae, **OPTIONS)
    vae.enable_tiling()
    vae.enable_slicing()
    encode(source, tmp_path / "tiled", vae=vae, **OPTIONS)
    assert vae.use_tiling
    assert vae.use_slicing
    plain, tiled = means(tmp_path / "plain"), means(tmp_path / "tiled")
    assert all(np.array_equal(plain[key], tiled[key]) for key in plain)


class Foreign(fastvae.models.attention_processor.AttnProcessor2_0):
    """A processor that computes what the identity does not know."""


def test_a_foreign_attention_processor_is_refused(source, tmp_path):
    vae = small_vae()
    vae.set_attn_processor(Foreign())
    with pytest.raises(
        ValueError, match=r"by a built-in processor .* got AutoencoderKL with Foreign at encoder\.mid_block"
    ):
        encode(source, tmp_path / "out", vae=vae, **OPTIONS)
    assert not (tmp_path / "out").exists()
    theirs = diffusers.AutoencoderKL(**{k: v for k, v in small_vae().config.items() if not k.startswith("_")})
    for processor in (diffusers.models.attention_processor.AttnProcessor(),):
        theirs.set_attn_processor(processor)
        assert encode(source, tmp_path / "theirs", vae=theirs, **OPTIONS).ok == 2


NO_MOMENTS = {
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "VQModel": lambda: diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
    "AutoencoderKL": lambda: small_vae(in_channels=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MOMENTS)
def test_a_model_without_moments_of_rgb_is_refused_before_the_output_is_touched(source, tmp_path, kind):
    words = (
        "takes 1-channel images"
        if kind == "AutoencoderKL"
        else f"mean and log-variance, 8 channels .* got {kind}, which"
    )
    with pytest.raises(ValueError, match=words):
        encode(source, tmp_path / "out", vae=NO_MOMENTS[kind](), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_fewer_channels_than_it_says_is_refused(source, tmp_path):
    vae = small_vae()
    vae.quant_conv.register_forward_hook(lambda module, args, out: out[:, :4])
    with pytest.raises(
        ValueError, match=r"must give mean and log-variance \[B, 8, h, w\], got AutoencoderKL, which gives"
    ):
        encode(source, tmp_path / "out", vae=vae, **OPTIONS)


def test_flux2_takes_whole_patches(source, tmp_path):
    config = {
        key: value for key, value in small_vae().config.items() if key.startswith(("block", "norm", "down", "up"))
    }
    vae = fastvae.AutoencoderKLFlux2(**config, latent_channels=8, layers_per_block=1)
    with pytest.raises(ValueError, match="multiple of the model's 16 pixels, got 24"):
        encode(source, tmp_path / "out", vae=vae, **OPTIONS | {"buckets": 24})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": 65_536}, r"buckets of 65536x65536 in batches of 1 need about .* GiB a step"),
        ({"buckets": 10**30}, "buckets must be at most 65536"),
        ({"batch": 10**6}, "batch must be at most"),
        ({"workers": 10**6}, "workers must be at most"),
        ({"workers": 0}, "workers must be 'auto' or at least 1"),
        ({"max_failures": float("inf")}, "max_failures must be"),
        ({"shard_mb": float("inf")}, "shard_mb must be above 0 and finite"),
        ({"max_pixels": float("inf")}, "max_pixels must be at least 1 and finite"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refusals_come_before_the_output_is_touched(source, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("fastvae.data.encoding.batch_size.total_memory", lambda device: 2**36)
    with pytest.raises(ValueError, match=words):
        encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS | change)
    assert not (tmp_path / "out").exists()


# The folder


def test_the_users_files_in_the_output_stay(source, tmp_path):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    own = [out / "notes.tmp.txt", out / "shards" / "mine.tmp.12.0123abcd", out / "backup" / "store.json.tmp.1.0123abcd"]
    (out / "backup").mkdir()
    for path in own:
        path.write_text("mine")
    leftover = out / "plan" / "units-00007.jsonl.tmp.12.0123abcd"
    leftover.write_text("half")
    encode(source, out, vae=small_vae(), **OPTIONS)
    assert [path.read_text() for path in own] == ["mine"] * 3
    assert not leftover.exists()


def test_a_folder_with_another_file_is_not_empty_whatever_its_name(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.tmp.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"neither empty nor a latent store: it holds diary\.tmp\.txt"):
        encode(source, out, vae=small_vae(), **OPTIONS)
    assert (out / "diary.tmp.txt").read_text() == "mine"
    (out / "diary.tmp.txt").rename(out / "store.json.tmp.12.0123abcd")  # what a killed run leaves
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 2


def test_a_store_that_is_planned_for_ever_is_not_waited_for(source, tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no such lock")
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), limit=1, **OPTIONS)
    monkeypatch.setattr("fastvae.data.store.lock.LOCK_TIMEOUT", 0.1)
    with locked(out), pytest.raises(StoreLocked, match=f"is locked: process {os.getpid()} has been planning it"):
        encode(source, out, vae=small_vae(), **OPTIONS)
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 1


def test_a_plan_file_is_never_replaced(tmp_path, monkeypatch):
    path = tmp_path / "units-00000.jsonl"
    write_atomically(path, [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, [b"second"], exclusive=True)

    def unsupported(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("fastvae.system.atomic_files.os.link", unsupported)
    with pytest.raises(FileExistsError):
        write_atomically(path, [b"second"], exclusive=True)
    assert path.read_bytes() == b"first"
    write_atomically(tmp_path / "other", [b"x"], exclusive=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", path.name]


@pytest.mark.parametrize(
    "change", [{"rows": 1}, {"rows": 3}, {"shard": "../in/000.png"}, {"unit": "0"}, {"shard": None}]
)
def test_a_record_that_does_not_fit_its_unit_is_not_believed(source, tmp_path, change):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    record = next(out.glob("shards/*.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert Store.open(out).commits() == {}
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 2


def test_a_damaged_shard_is_made_again_by_the_same_command(source, tmp_path):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    whole = means(out)
    shard = next(out.glob("shards/*.safetensors"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(StoreError, match="is damaged"):
        LatentDataset(out)
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 2
    assert all(np.array_equal(whole[key], value) for key, value in means(out).items())


@pytest.mark.parametrize("line", ["[]", "3", '{"unit": 0, "key": 1, "size": 2, "mtime_ns": 3}', "null"])
def test_a_plan_line_that_is_none_is_a_store_error(source, tmp_path, line):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    (out / "plan" / "units-00000.jsonl").write_text(line + "\n")
    with pytest.raises(StoreError, match=r"units-00000\.jsonl is damaged"):
        encode(source, out, vae=small_vae(), **OPTIONS)


def test_a_store_without_commits_may_become_another(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(self, pixels):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastvae.data.encoding.encoder.MomentEncoder.start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode(source, out, vae=small_vae(), **OPTIONS)
    assert encode(source, out, vae=small_vae(1), **OPTIONS | {"buckets": 64}).ok == 2
    assert LatentDataset(out)[0]["mean"].shape == (4, 8, 8)
    with pytest.raises(IdentityMismatch):
        encode(source, out, vae=small_vae(), **OPTIONS)


# Failures whose cause is gone


def test_what_could_not_be_read_is_tried_again(source, tmp_path, monkeypatch):
    out, real = tmp_path / "out", Path.open
    locked_file = source / "001.png"

    def denied(path, *arguments, **named):
        if path == locked_file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        assert encode(source, out, vae=small_vae(), **OPTIONS).reasons == {"unreadable": 1}
    report = encode(source, out, vae=small_vae(), **OPTIONS)
    assert (report.ok, report.resumed, report.failed_before, report.reasons) == (1, 1, 0, {})
    assert sorted(means(out)) == ["000.png", "001.png"]
    assert encode(source, out, vae=small_vae(), **OPTIONS).resumed == 2
    assert len(list(out.glob("plan/*"))) == 2


def test_what_was_too_large_is_tried_again_under_a_higher_limit(source, tmp_path):
    out = tmp_path / "out"
    picture(9, 100, 80).save(source / "large.png")
    options = {"vae": small_vae(), **OPTIONS}
    assert encode(source, out, max_pixels=5000, **options).reasons == {"too_large": 1}
    assert encode(source, out, max_pixels=5000, **options).failed_before == 1
    assert encode(source, out, max_pixels=6000, **options).failed == 1
    assert encode(source, out, max_pixels=8000, **options).ok == 1
    assert sorted(means(out)) == ["000.png", "001.png", "large.png"]


# Odd sources and consoles


def test_row_12_what_cannot_be_looked_into_is_passed_over_and_named(source, tmp_path, monkeypatch):
    os.symlink("loop", source / "loop")
    (source / "closed").mkdir()
    real = os.scandir

    def scandir(folder):
        if os.path.basename(folder) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = list_folder(source)
    assert [file.key for file in listing.files] == ["000.png", "001.png"]
    assert listing.ignored == 2
    assert sorted(listing.unreadable) == ["closed", "loop"]
    report = encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert "ignored 2 others, among them what cannot be looked into: " in "\n".join(report.lines())


class Full:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")

    encoding = "utf-8"


@pytest.mark.parametrize("stderr", [None, "full", "closed"])
def test_a_run_outlives_its_stderr(source, tmp_path, monkeypatch, stderr):
    closed = open(os.devnull, "w")  # noqa: SIM115 (closed is the point)
    closed.close()
    monkeypatch.setattr(sys, "stderr", {None: None, "full": Full(), "closed": closed}[stderr])
    assert encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS | {"progress": True}).ok == 2


def test_json_has_no_numbers_that_json_has_not():
    report = EncodeReport("out", "id", "bf16", float("nan"))
    assert json.loads(report.to_json(), parse_constant=pytest.fail)["dtype_error"] is None
    assert strict_json({"psnr": {"a": float("inf"), "b": 3.5}, "of": (float("-inf"),)}) == (
        '{"psnr": {"a": null, "b": 3.5}, "of": [null]}'
    )


def test_an_error_relative_to_nothing_is_none(source, tmp_path):
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
    assert encode(source, tmp_path / "out", vae=vae, **OPTIONS | {"dtype": "bf16"}).dtype_error is None


# Decoding


def test_decode_finds_its_model_again_and_refuses_another(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small_vae().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    encode(source, out, vae="model", **OPTIONS)
    monkeypatch.chdir(source)
    assert LatentDataset(out).made_with["vae"] == str(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(decode(out, tmp_path / "png", device="cpu")) == 2
        # The same weights in another file are the same model.
        (tmp_path / "again").mkdir()
        vae = small_vae()
        vae.save_pretrained(tmp_path / "again", max_shard_size="8KB")
        assert len(decode(out, tmp_path / "png", vae=tmp_path / "again", device="cpu")) == 2
        assert len(decode(out, tmp_path / "png", vae=vae)) == 2
    small_vae(1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds other weights than those the store was made with"):
        decode(out, tmp_path / "other", device="cpu")
    assert not (tmp_path / "other").exists()
    with pytest.warns(UserWarning, match="is another model than the one"):
        decode(out, tmp_path / "other", vae=tmp_path / "model", device="cpu")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA"), (2, None)])
def test_pictures_of_other_channels(source, tmp_path, channels, mode):
    vae = small_vae(out_channels=channels)
    encode(source, tmp_path / "out", vae=vae, **OPTIONS)
    if mode is None:
        with pytest.raises(ValueError, match="decodes to 2 channels; a picture has 1, 3 or 4"):
            decode(tmp_path / "out", tmp_path / "png", vae=vae)
        assert not (tmp_path / "png").exists()
        return
    ((_, path), *_) = decode(tmp_path / "out", tmp_path / "png", vae=vae)
    with Image.open(path) as image:
        assert image.mode == mode
