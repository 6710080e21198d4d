"""Broken, missing and hostile files: one sentence that names the file; nothing is run, nothing is half loaded."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from fastvae.checkpoints import loading
from fastvae.models import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
PICKLE = "diffusion_pytorch_model.bin"


def refusal(directory, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        AutoencoderKL.from_pretrained(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def _header(text):
    return struct.pack("<Q", len(text)) + text


BROKEN = {
    "empty": lambda whole: b"",
    "seven_bytes": lambda whole: whole[:7],
    "cut_in_the_header": lambda whole: whole[:200],
    "cut_in_the_data": lambda whole: whole[:-1],
    "a_byte_too_many": lambda whole: whole + b"\0",
    "header_longer_than_memory": lambda whole: struct.pack("<Q", 2**63) + whole[8:],
    "header_is_no_json": lambda whole: _header(b"not json"),
    "header_is_no_text": lambda whole: _header(b"\xff\xfe\x00"),
    "header_is_a_list": lambda whole: _header(b"[]"),
    "offsets_beyond_the_file": lambda whole: _header(
        json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]}}).encode()
    ),
    "unknown_dtype": lambda whole: (
        _header(b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}') + b"\0" * 4
    ),
    "a_pickle_by_another_name": lambda whole: pickle.dumps({"x": 1}),
    "a_web_page": lambda whole: b"<!DOCTYPE html><html>please log in</html>",
    "a_git_lfs_pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_row_27_a_broken_safetensors_file_is_named(saved, case):
    path = saved / WEIGHTS
    path.write_bytes(BROKEN[case](path.read_bytes()))
    assert refusal(saved).startswith(f"{path}: not a complete safetensors file ({path.stat().st_size} bytes")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("[" * 10**5, "not valid JSON"),
    ],
    ids=["empty", "cut", "a_list", "nested_beyond_the_stack"],
)
def test_a_broken_config_is_named(saved, content, words):
    (saved / "config.json").write_text(content)
    message = refusal(saved)
    assert message.startswith(str(saved / "config.json"))
    assert words in message


def test_row_28_an_absurd_config_is_refused_before_the_weights_are_opened(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "latent_channels": 10**9}))
    (saved / WEIGHTS).unlink()
    assert refusal(saved).startswith(f"{saved / 'config.json'}: latent_channels must be a whole number")


def test_missing_files_are_named(saved, tmp_path):
    (saved / WEIGHTS).rename(saved / "diffusion_pytorch_model.fp16.safetensors")
    assert refusal(saved) == f"{saved / WEIGHTS}: no such file; there is variant='fp16'"
    assert "the plain variant" not in refusal(saved, variant="ema")
    (saved / "config.json").unlink()
    assert refusal(saved) == f"{saved / 'config.json'}: no such file"
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert refusal(saved, subfolder="vae") == f"{saved / 'vae'}: no such directory (subfolder='vae')"


def test_the_plain_variant_is_named_where_only_it_is_there(saved):
    words = "diffusion_pytorch_model.fp16.safetensors: no such file; there is the plain variant (variant=None)"
    assert words in refusal(saved, variant="fp16")


def test_a_whole_pipeline_is_refused_with_its_subfolder(model, tmp_path, layouts):
    (tmp_path / "model_index.json").write_text("{}")
    model.save_pretrained(tmp_path / "vae")
    assert refusal(tmp_path) == f'{tmp_path}: this is a whole pipeline; pass subfolder="vae" to load its VAE'
    loaded = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())


def test_missing_unknown_and_misshapen_tensors_are_named(model, saved, layouts):
    state = dict(model.state_dict())
    del state["encoder.conv_in.bias"]
    layouts.write(saved / WEIGHTS, state)
    assert refusal(saved).endswith(f"1 of {len(state) + 1} tensors are missing: encoder.conv_in.bias")
    state = {**model.state_dict(), "encoder.conv_in.extra": torch.zeros(1), "other.weight": torch.zeros(1)}
    layouts.write(saved / WEIGHTS, state)
    message = refusal(saved)
    assert "2 tensors are unknown to the model: " in message
    assert "encoder.conv_in.extra" in message
    assert "other.weight" in message
    layouts.write(saved / WEIGHTS, {**model.state_dict(), "quant_conv.weight": torch.zeros(8, 8, 1, 2)})
    assert "quant_conv.weight has shape [8, 8, 1, 2], expected [8, 8, 1, 1]" in refusal(saved)
    layouts.write(saved / WEIGHTS, {f"unet.{name}": tensor for name, tensor in model.state_dict().items()})
    assert "holds no VAE: unet." in refusal(saved)


def test_a_square_of_another_shape_is_not_squeezed(model, saved, layouts):
    name = "encoder.mid_block.attentions.0.to_q.weight"
    layouts.write(saved / WEIGHTS, {**model.state_dict(), name: torch.zeros(32, 32, 2, 1)})
    assert f"{name} has shape [32, 32, 2, 1], expected [32, 32] for {name}" in refusal(saved)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", 3, "x.bin"]
)
def test_row_27_an_index_may_not_leave_its_directory(model, tmp_path, shard, layouts):
    inside = tmp_path / "inside"
    model.save_pretrained(inside, max_shard_size="100KB")
    layouts.write(tmp_path / "outside.safetensors", model.state_dict())
    (inside / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), shard)}))
    message = refusal(inside)
    assert message.startswith(str(inside / INDEX))
    assert "are taken" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": null}'])
def test_a_broken_index_is_named(saved, content):
    (saved / INDEX).write_text(content)
    assert refusal(saved).startswith(f"{saved / INDEX}: not a shard index")


def test_an_index_with_a_wrong_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["encoder.conv_in.weight"] = index["weight_map"]["decoder.conv_out.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert index["weight_map"]["decoder.conv_out.weight"] in message
    assert "the index says that encoder.conv_in.weight is here" in message


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_row_29_a_pickle_is_refused_unless_allowed(model, saved, layouts):
    (saved / WEIGHTS).unlink()
    torch.save({"state_dict": layouts.to_deprecated(model.state_dict())}, saved / PICKLE)
    message = refusal(saved)
    assert message.startswith(f"{saved / PICKLE}: this is a pickle file")
    assert "allow_pickle=True" in message
    loaded = AutoencoderKL.from_pretrained(saved, allow_pickle=True)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="this is a pickle file"):
        AutoencoderKL.from_single_file(saved / PICKLE, config=model.config)
    loaded = AutoencoderKL.from_single_file(saved / PICKLE, config=model.config, allow_pickle=True)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_row_29_a_payload_in_a_pickle_is_never_run(model, saved, suffix):
    mark = saved / "was_run"
    path = saved / f"model{suffix}"
    torch.save({"encoder.conv_in.weight": _Payload(mark)}, path)
    for allow in (False, True):
        with pytest.raises(ValueError, match="pickle file" if not allow else "none of it was run"):
            AutoencoderKL.from_single_file(path, config=model.config, allow_pickle=allow)
    assert not mark.exists()
    # The payload works when it is run, so this test can fail.
    with path.open("rb") as file:
        torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1, 2], protocol=2)], ids=["empty", "junk", "a_list"])
def test_a_broken_pickle_is_named(model, tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt: ") as caught:
        AutoencoderKL.from_single_file(path, config=model.config, allow_pickle=True)
    assert "\n" not in str(caught.value)


def test_the_tiny_model_is_the_embedded_one(monkeypatch, tmp_path, saved, layouts):
    monkeypatch.setattr(loading.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match='"tiny": this installation does not carry the embedded model'):
        AutoencoderKL.from_pretrained("tiny")
    (tmp_path / "assets").mkdir()
    saved.rename(tmp_path / "assets" / "tiny")
    loaded = AutoencoderKL.from_pretrained("tiny")
    assert loaded.config._name_or_path == "tiny"
    assert loaded.config.block_out_channels == layouts.small["block_out_channels"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused_by_name(model, saved, dtype):
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    state["encoder.conv_in.bias"] = state["encoder.conv_in.bias"].to(dtype)
    save_file(state, saved / WEIGHTS)
    assert f"{WEIGHTS}: encoder.conv_in.bias is {str(dtype).removeprefix('torch.')}; floating" in refusal(saved)
