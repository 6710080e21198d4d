"""Directories: saved by fastvae and loaded by diffusers, and the other way round, whole and in halves."""

import copy
import json
import pickle

import diffusers
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from fastvae.checkpoints import files, model_class_name
from fastvae.checkpoints.tensors import Checkpoint
from fastvae.models import AutoencoderKL, AutoencoderKLFlux2

WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = [None, torch.float16, torch.bfloat16]
FLUX2 = {
    "block_out_channels": (16, 32),
    "decoder_block_out_channels": (8, 16),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
SAVES = [{}, {"variant": "fp16"}, {"max_shard_size": "200KB"}, {"variant": "fp16", "max_shard_size": 100_000}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SAVES, ids=["plain", "variant", "shards", "variant_shards"])
def test_saved_here_and_loaded_by_diffusers(model, options, dtype, tmp_path, layouts):
    model.save_pretrained(tmp_path, **options)
    variant = options.get("variant")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, variant=variant, torch_dtype=dtype)
    layouts.assert_same_state(theirs.state_dict(), model.state_dict(), dtype)
    for key, value in model.config.items():
        theirs_value = theirs.config[key]
        assert (tuple(theirs_value) if isinstance(theirs_value, list) else theirs_value) == value, key
    assert bool(files.find_weights(files.Repository(str(tmp_path)), variant).index) == ("max_shard_size" in options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SAVES, ids=["plain", "variant", "shards", "variant_shards"])
def test_saved_by_diffusers_and_loaded_here(model, options, dtype, tmp_path, layouts):
    theirs = diffusers.AutoencoderKL(**layouts.small)
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path, **options)
    ours = AutoencoderKL.from_pretrained(tmp_path, variant=options.get("variant"), torch_dtype=dtype)
    layouts.assert_same_state(ours.state_dict(), model.state_dict(), dtype)
    assert {key: value for key, value in ours.config.items() if key != "_name_or_path"} == model.config
    assert ours.config._name_or_path == str(tmp_path)
    assert not ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert ours.load_report.renamed == {}
    assert ours.load_report.loaded == tuple(sorted(model.state_dict()))


@pytest.mark.parametrize("asked", ["auto", None, torch.float64])
def test_the_dtype_is_the_files_or_what_was_asked(model, asked, tmp_path):
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=asked)
    expected = {"auto": torch.float16, None: torch.float32}.get(asked, asked)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=asked).dtype == expected
    assert loaded.load_report.dtypes == {"float16": len(loaded.state_dict())}


@pytest.mark.parametrize("asked", [torch.int8, "float16", 16])
def test_another_dtype_is_refused(saved, asked):
    with pytest.raises(ValueError, match="torch_dtype must be a floating-point"):
        AutoencoderKL.from_pretrained(saved, torch_dtype=asked)


def test_two_names_of_the_dtype_may_not_differ(model, saved):
    words = r"torch_dtype and dtype are one argument, got torch\.float16 and auto: give one of them"
    for load, source in (
        (AutoencoderKL.from_pretrained, saved),
        (AutoencoderKL.from_single_file, saved / WEIGHTS),
        (AutoencoderKL.from_preset, "sd15"),
    ):
        with pytest.raises(ValueError, match=words):
            load(source, torch_dtype=torch.float16, dtype="auto")
    assert AutoencoderKL.from_pretrained(saved, torch_dtype=torch.float16, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("half", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_half_a_model_reads_no_tensor_of_the_other_half(model, saved, half, other, monkeypatch, layouts):
    read = []
    opened = safetensors.safe_open

    class Counting:
        def __init__(self, *args, **options):
            self.file = opened(*args, **options)

        def __enter__(self):
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.inside.keys()

        def get_slice(self, name):
            read.append(name)
            return self.inside.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self.inside.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Counting)
    loaded = AutoencoderKL.from_pretrained(saved, parts=(half,))
    roots = (f"{half}.", "quant_conv." if half == "encoder" else "post_quant_conv.")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(roots)}
    assert set(read) == set(expected)
    layouts.assert_same_state(loaded.state_dict(), expected)
    assert getattr(loaded, other) is None
    assert set(loaded.load_report.not_read) == set(model.state_dict()) - set(expected)
    assert f"AutoencoderKL ({half})" in str(loaded.load_report)


def test_an_encoder_opens_no_shard_of_the_decoder(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    encoder_shards = {shard for name, shard in index.items() if name.startswith(("encoder.", "quant_conv."))}
    deleted = set(index.values()) - encoder_shards
    assert deleted
    for shard in deleted:
        (tmp_path / shard).unlink()
    loaded = AutoencoderKL.from_pretrained(tmp_path, parts="encoder")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x).latent_dist.mean, model.encode(x).latent_dist.mean)
    with pytest.raises(FileNotFoundError, match=r"00\d+-of-.*missing, but .*index\.json lists this shard"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_half_a_model_names_its_missing_part(saved, tmp_path):
    encoder = AutoencoderKL.from_pretrained(saved, parts=("encoder",))
    with pytest.raises(RuntimeError, match="parts"):
        encoder.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="has no decoder, and half a model is no checkpoint"):
        encoder.save_pretrained(tmp_path / "half")
    decoder = AutoencoderKL.from_pretrained(saved, parts=("decoder",))
    with pytest.raises(RuntimeError, match="parts"):
        decoder.encode(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("parts", [(), ("head",), "both"])
def test_unknown_parts_are_refused(saved, parts):
    with pytest.raises(ValueError, match='parts must name "encoder", "decoder" or both'):
        AutoencoderKL.from_pretrained(saved, parts=parts)


def test_deprecated_attention_names_load_and_are_reported(model, saved, layouts):
    layouts.write(saved / WEIGHTS, layouts.to_deprecated(model.state_dict()))
    loaded = AutoencoderKL.from_pretrained(saved)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())
    renamed = loaded.load_report.renamed
    assert len(renamed) == 16
    assert renamed["decoder.mid_block.attentions.0.query.weight"] == "decoder.mid_block.attentions.0.to_q.weight"
    assert "16 renamed to diffusers' names" in str(loaded.load_report)


def test_fused_copies_that_diffusers_leaves_are_dropped_and_reported(saved, tmp_path, layouts):
    theirs = diffusers.AutoencoderKL.from_pretrained(saved)
    theirs.fuse_qkv_projections()
    theirs.save_pretrained(tmp_path / "fused")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "fused")
    layouts.assert_same_state(loaded.state_dict(), AutoencoderKL.from_pretrained(saved).state_dict())
    assert {name.split(".")[-2] for name in loaded.load_report.dropped} == {"to_qkv"}


def test_the_weights_do_not_depend_on_the_file_after_loading(model, saved, layouts):
    loaded = AutoencoderKL.from_pretrained(saved)
    path = saved / WEIGHTS
    path.write_bytes(b"\0" * path.stat().st_size)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict())


def test_flux2_with_a_smaller_decoder_goes_both_ways(tmp_path, layouts):
    ours = AutoencoderKLFlux2(**FLUX2)
    ours.bn.running_mean.normal_()
    ours.bn.num_batches_tracked.fill_(3)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path)
    layouts.assert_same_state(theirs.state_dict(), ours.state_dict())
    again = AutoencoderKLFlux2.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    layouts.assert_same_state(again.state_dict(), ours.state_dict(), torch.bfloat16)
    encoder = AutoencoderKLFlux2.from_pretrained(tmp_path, parts=("encoder",))
    assert torch.equal(encoder.bn.running_mean, ours.bn.running_mean)


def test_the_class_of_a_directory(saved, tmp_path):
    AutoencoderKLFlux2(**FLUX2).save_pretrained(tmp_path / "flux2")
    assert model_class_name(saved) == "AutoencoderKL"
    assert model_class_name(tmp_path / "flux2") == "AutoencoderKLFlux2"
    with pytest.raises(ValueError, match=r"load it with fastvae\.AutoencoderKLFlux2"):
        AutoencoderKL.from_pretrained(tmp_path / "flux2")
    with pytest.raises(ValueError, match=r"load it with fastvae\.AutoencoderKL$"):
        AutoencoderKLFlux2.from_pretrained(saved)


def test_a_subclass_is_saved_as_the_class_that_diffusers_knows(saved, tmp_path):
    class Mine(AutoencoderKL):
        pass

    mine = Mine.from_pretrained(saved)
    assert type(mine) is Mine
    mine.save_pretrained(tmp_path / "mine")
    assert AutoencoderKL.load_config(tmp_path / "mine")["_class_name"] == "AutoencoderKL"


def test_channels_last_tied_and_strided_weights_are_saved(model, tmp_path, layouts):
    odd = copy.deepcopy(model).to(memory_format=torch.channels_last)
    odd.encoder.conv_in.bias.data = torch.zeros(64)[::4]
    odd.encoder.conv_norm_out.bias = odd.encoder.conv_norm_out.weight
    odd.save_pretrained(tmp_path)
    layouts.assert_same_state(load_file(tmp_path / WEIGHTS), odd.state_dict())


def test_a_save_over_a_save_leaves_nothing_stale(model, tmp_path, layouts):
    """diffusers prefers an index to a file: with a leftover index it would load the old weights."""
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    model.save_pretrained(tmp_path, variant="ema")
    (tmp_path / "notes.txt").write_text("mine")
    other = AutoencoderKL.from_config(model.config)
    other.save_pretrained(tmp_path)
    ema = "diffusion_pytorch_model.ema.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", ema, WEIGHTS, "notes.txt"]
    layouts.assert_same_state(diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict(), other.state_dict())
    other.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / WEIGHTS).exists()
    layouts.assert_same_state(AutoencoderKL.from_pretrained(tmp_path).state_dict(), other.state_dict())


def test_an_interrupted_save_keeps_the_old_model(model, saved, monkeypatch, layouts):
    def fails_halfway(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fastvae.checkpoints.saving.save_file", fails_halfway)
    with pytest.raises(OSError, match="disk full"):
        AutoencoderKL.from_config(model.config).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", WEIGHTS]
    layouts.assert_same_state(AutoencoderKL.from_pretrained(saved).state_dict(), model.state_dict())


@pytest.mark.parametrize("size", [0, -1, True, "lots", "0GB", "-5GB", "1e999GB", "5", "nanGB", 1.5, None])
def test_a_bad_shard_size_is_refused(model, size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size must be"):
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["../up", "a/b", "", "a.b"])
def test_a_variant_that_is_no_word_is_refused(model, variant, tmp_path):
    with pytest.raises(ValueError, match="variant must be a plain word"):
        model.save_pretrained(tmp_path, variant=variant)


def test_a_file_instead_of_a_directory_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_pretrained takes a directory"):
        model.save_pretrained(tmp_path / "file")


def test_weights_without_values_are_refused(tmp_path, layouts):
    with torch.device("meta"):
        empty = AutoencoderKL(**layouts.small)
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        empty.save_pretrained(tmp_path)


def test_a_loaded_model_copies_and_pickles(saved, layouts):
    loaded = AutoencoderKL.from_pretrained(saved)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        layouts.assert_same_state(other.state_dict(), loaded.state_dict())
        assert other.config == loaded.config
        assert other.load_report == loaded.load_report


def test_a_checkpoint_lists_shapes_across_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shapes = Checkpoint(files.find_weights(files.Repository(str(tmp_path)))).shapes()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_arguments_that_diffusers_callers_pass(tmp_path, layouts):
    model = AutoencoderKL(**layouts.small)
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1").exists()
    model.save_pretrained(tmp_path / "rank0", True, safe_serialization=True)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "rank0", use_safetensors=True)
    assert loaded.config.block_out_channels == model.config.block_out_channels
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="use_safetensors=False asks for a pickle"):
        AutoencoderKL.from_pretrained(tmp_path / "rank0", use_safetensors=False)
