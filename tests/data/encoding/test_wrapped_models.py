"""Models inside wrappers (torch.compile, data parallelism, PEFT, forwarding modules): encode and repair."""

import json

import peft
import pytest
import torch
from support.small_store import SIDE, small_vae, write_pictures
from torch import nn

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.model import load_model, model_identity
from fastvae.data.encoding.repair import repair
from fastvae.data.store.errors import IdentityMismatch
from fastvae.models import AutoencoderKLFlux2

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


class Forwarding(nn.Module):
    """A module that forwards every attribute to the model inside."""

    def __init__(self, vae):
        super().__init__()
        self.inner = vae

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Encoding(Forwarding):
    """A module with an encode of its own, which gives the same."""

    def encode(self, x):
        return self.inner.encode(x)


class Brightening(Forwarding):
    """A module with an encode of its own, which gives other moments."""

    def encode(self, x):
        return self.inner.encode(x + 0.1)


def with_adapter(vae, alpha=8):
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["conv_in", "to_q"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(vae, config)


WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "forwarding": Forwarding,
    "an encode of its own": Encoding,
    "compiled and forwarding": lambda vae: Forwarding(torch.compile(vae)),
}


def shard_of(store):
    return next(path for path in (store / "shards").iterdir() if path.suffix != ".json")


def identity(vae):
    return model_identity(load_model(vae, None, None)[0])


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_has_the_identity_of_the_model_inside(wrap):
    assert identity(wrap(small_vae())) == identity(small_vae())
    assert identity(wrap(small_vae(seed=1))) != identity(small_vae())


def test_a_store_of_a_wrapped_model_takes_no_other_weights(tmp_path):
    write_pictures(tmp_path / "in", 2)
    vae = torch.compile(small_vae())
    assert encode(tmp_path / "in", tmp_path / "out", vae=vae, **OPTIONS).ok == 2
    stored = json.loads((tmp_path / "out" / "store.json").read_text())
    assert stored["identity"]["model"]["class"] == stored["source"]["vae"] == "AutoencoderKL"
    assert encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS).resumed == 2
    with pytest.raises(IdentityMismatch):
        encode(tmp_path / "in", tmp_path / "out", vae=torch.compile(small_vae(seed=1)), **OPTIONS)
    shard_of(tmp_path / "out").unlink()
    with pytest.raises(IdentityMismatch):
        repair(tmp_path / "out", tmp_path / "in", vae=Forwarding(small_vae(seed=1)), device="cpu", progress=False)
    repaired = repair(tmp_path / "out", tmp_path / "in", vae=Forwarding(small_vae()), device="cpu", progress=False)
    assert repaired.report.ok == 2


def test_adapters_are_in_the_identity_with_scale_and_state():
    wrapped = with_adapter(small_vae())
    moments = wrapped.encode(torch.ones(1, 3, 16, 16)).latent_dist.parameters
    model = load_model(wrapped, None, None)[0]
    assert torch.allclose(model.encode(torch.ones(1, 3, 16, 16)).latent_dist.parameters, moments, atol=1e-5)
    assert set(model.state_dict()) == set(small_vae().state_dict())
    known = {json.dumps(identity(vae)) for vae in (small_vae(), wrapped, with_adapter(small_vae(), alpha=16))}
    assert len(known) == 3
    with wrapped.disable_adapter():
        assert identity(wrapped) == identity(small_vae())
        assert identity(wrapped.base_model.model) == identity(small_vae())
    assert identity(wrapped.base_model.model) == identity(wrapped)
    assert any("lora" in name for name in wrapped.state_dict())  # the caller's model is not changed


def test_a_wrapper_that_encodes_otherwise_is_refused(tmp_path):
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=r"vae must be the VAE itself: Brightening gives other moments than the Auto"):
        encode(tmp_path / "in", tmp_path / "out", vae=Brightening(small_vae()), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_an_identity_over_no_tensor_is_refused():
    empty = nn.Module()
    empty.config, empty.quant_conv = small_vae().config, nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match=r"must have weights of an encoder, 'encoder\.\*', got Module with none"):
        model_identity(empty)


OF_DECODERS = [{"out_channels": 4}, {"use_post_quant_conv": False}, {"up_block_types": ("AttnUpDecoderBlock2D",) * 4}]


def with_first_encoder(**changes):
    """Return a model of another config with the weights of small_vae()'s encoder."""
    vae, first = small_vae(**changes), small_vae()
    vae.encoder, vae.quant_conv = first.encoder, first.quant_conv
    return vae


@pytest.mark.parametrize("hint", [{"sample_size": 64}, {"force_upcast": False}, *OF_DECODERS])
def test_config_values_that_change_no_latent_do_not_end_a_store(tmp_path, hint):
    write_pictures(tmp_path / "in", 2)
    made = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), limit=1, **OPTIONS)
    before = (tmp_path / "out" / "store.json").read_bytes()
    again = encode(tmp_path / "in", tmp_path / "out", vae=with_first_encoder(**hint), **OPTIONS)
    assert (again.ok, again.resumed, again.identity) == (1, 1, made.identity)
    dry = encode(tmp_path / "in", tmp_path / "out", vae=with_first_encoder(**hint), dry_run=True, **OPTIONS)
    assert dry.identity == made.identity
    shard_of(tmp_path / "out").unlink()
    repaired = repair(tmp_path / "out", tmp_path / "in", vae=with_first_encoder(**hint), device="cpu", progress=False)
    assert repaired.report.identity == made.identity
    assert (tmp_path / "out" / "store.json").read_bytes() == before
    with pytest.raises(IdentityMismatch, match="scaling_factor"):
        encode(tmp_path / "in", tmp_path / "out", vae=with_first_encoder(**hint, scaling_factor=0.5), **OPTIONS)


def test_flux2_with_another_decoder_continues_its_store(tmp_path):
    """The public decoders of FLUX.2, full and small, have one encoder."""
    write_pictures(tmp_path / "in", 2)
    narrow = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    torch.manual_seed(0)
    full = AutoencoderKLFlux2(**narrow).eval()
    small = AutoencoderKLFlux2(**narrow, decoder_block_out_channels=(4,) * 4, batch_norm_momentum=0.5).eval()
    small.encoder, small.quant_conv = full.encoder, full.quant_conv
    assert encode(tmp_path / "in", tmp_path / "out", vae=full, limit=1, **OPTIONS).ok == 1
    again = encode(tmp_path / "in", tmp_path / "out", vae=small, **OPTIONS)
    assert (again.ok, again.resumed) == (1, 1)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_encoder_has_the_identity_of_the_encoder_inside(wrap):
    vae = small_vae()
    vae.encoder = wrap(vae.encoder)
    assert identity(vae) == identity(small_vae())
