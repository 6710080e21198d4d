"""Changed weights: written, recast, saved, copied; the next call uses them, frozen ones after refresh."""

import copy
import io
import pickle

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from fast.small_models import LIBRARIES, ONE_BLOCK
from fast.small_models import smallest_model as tiny
from safetensors.torch import load_file, save_file
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae.fast.fallback_reasons import Reason

WHERE = "encoder.mid_block.resnets.0.conv1.weight"


def pixels(dtype=torch.float32):
    return (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)


def assert_computes(vae, weights, dtype=torch.float32):
    """Assert that the accelerated encoder computes with the weights of another model; return its output."""
    rows = fastvae.fast_report(vae)["rows"]
    eager = copy.deepcopy(weights.encoder).to(dtype)
    truth = copy.deepcopy(eager).double()
    x = pixels(dtype)
    with torch.no_grad():
        plain = eager.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        exact = truth(x.double())
        ours = vae.encoder(x)
    assert_as_accurate(ours, plain, exact)
    assert fastvae.fast_report(vae)["rows"] == rows + 1, "on the fast path"
    return ours


# Ways in which training scripts write weights: each gives the first model the weights of the second.


def through_data(vae, other):
    for mine, theirs in zip(vae.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs)


def data_exchanged(vae, other):
    for mine, theirs in zip(vae.parameters(), other.parameters(), strict=True):
        mine.data = theirs.clone()


def all_at_once(vae, other):
    torch._foreach_copy_(list(vae.parameters()), list(other.parameters()))


def averaged(vae, other):
    EMAModel(other.parameters()).copy_to(vae.parameters())


def stored_and_back(vae, other):
    """EMAModel around a validation: write the averages, then restore the model's own weights."""
    average = EMAModel(vae.parameters())
    through_data(vae, other)
    own = EMAModel(vae.parameters())
    own.store(vae.parameters())
    average.copy_to(vae.parameters())
    own.restore(vae.parameters())


def loaded(vae, other):
    assert not vae.load_state_dict(other.state_dict()).missing_keys


def assigned(vae, other):
    vae.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def made_in_inference_mode(vae, other):
    with torch.inference_mode():
        weights = {name: weight.clone() for name, weight in other.state_dict().items()}
    assert weights[WHERE].is_inference()
    vae.load_state_dict(weights, assign=True)
    vae.requires_grad_(False)


def in_channels_last(vae, other):
    vae.load_state_dict(other.state_dict())
    vae.to(memory_format=torch.channels_last)
    assert not vae.get_parameter(WHERE).is_contiguous()


WRITES = {
    write.__name__.replace("_", " "): write
    for write in (
        through_data, data_exchanged, all_at_once, averaged, stored_and_back, loaded, assigned, made_in_inference_mode,
        in_channels_last,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", short_run(WRITES, ["through data", "assigned"]))
def test_a_write_is_seen_by_the_next_call(name):
    vae, other = fastvae.accelerate(tiny("diffusers")), tiny("diffusers", seed=1)
    before = vae.encoder(pixels())
    WRITES[name](vae, other)
    assert not torch.allclose(assert_computes(vae, other), before)


@pytest.mark.parametrize(
    "name", short_run(["through data", "averaged", "loaded", "made in inference mode"], ["made in inference mode"])
)
def test_a_write_to_frozen_weights_is_seen_after_refresh(name):
    vae, other = fastvae.accelerate(tiny(), freeze=True), tiny(seed=1)
    before = vae.encoder(pixels())
    assert fastvae.fast_report(vae)["packed_bytes"] > 0
    WRITES[name](vae, other)
    assert fastvae.refresh(vae) is vae
    assert fastvae.fast_report(vae)["packed_bytes"] == 0
    assert not torch.allclose(assert_computes(vae, other), before)


# Each library and each setting once.
LIBRARY_AND_FREEZE = short_run(
    [(library, freeze) for library in LIBRARIES for freeze in (False, True)], [("fastvae", False), ("diffusers", True)]
)


@pytest.mark.parametrize(("library", "freeze"), LIBRARY_AND_FREEZE)
def test_recast_and_back(library, freeze):
    """SDXL's pipelines recast within one call; frozen weights are packed for each dtype."""
    vae, plain = (tiny(library, **ONE_BLOCK).half() for _ in range(2))
    fastvae.accelerate(vae, freeze=freeze)
    for dtype in (torch.float16, torch.float32, torch.float16):
        vae.to(dtype)
        assert_computes(vae, plain, dtype)


def test_a_model_that_was_away_and_came_back():
    """Nothing of the weights is kept on the meta device; weights loaded later are used."""
    vae, other = fastvae.accelerate(tiny(**ONE_BLOCK)), tiny(seed=1, **ONE_BLOCK)
    vae.encoder(pixels())
    vae.to("meta")
    assert set(fastvae.explain(vae).reasons.values()) == {Reason.META}
    vae.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert_computes(vae, other)


def test_weights_packed_in_inference_mode_serve_outside_it():
    vae = fastvae.accelerate(tiny(**ONE_BLOCK), freeze=True)
    with torch.inference_mode():
        inside = vae.encoder(pixels())
    assert torch.equal(vae.encoder(pixels()), inside)
    x = pixels().requires_grad_()
    assert torch.autograd.grad(vae.encoder(x).sum(), x)[0].abs().max() > 0


def test_weights_packed_under_a_fake_mode_are_not_kept():
    """They have no values, and later calls would return fake tensors."""
    vae, x = fastvae.accelerate(tiny(mid_block_add_attention=False), freeze=True), torch.ones(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae.encoder(torch.empty(1, 3, 4, 4))
    assert fastvae.fast_report(vae)["packed_bytes"] == 0
    assert type(vae.encoder(x.expand(1, 3, 4, 4))) is torch.Tensor


def test_a_refresh_by_another_thread_takes_nothing_from_a_call():
    class Forgetful(dict):
        """A dictionary that another thread clears after every membership test."""

        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    vae = fastvae.accelerate(tiny(), freeze=True)
    before = vae.encoder(pixels())
    derived = vars(vae)["_fastvae"].packed
    derived.kept, derived.shared = Forgetful(derived.kept), Forgetful(derived.shared)
    assert torch.equal(vae.encoder(pixels()), before)


@pytest.mark.parametrize(("library", "freeze"), LIBRARY_AND_FREEZE)
def test_the_state_dict_is_that_of_before(library, freeze, tmp_path):
    """Same keys, values and strides, so safetensors, which refuses channels_last, can save it."""
    vae = tiny(library)
    before = {name: (value.clone(), value.stride()) for name, value in vae.state_dict().items()}
    fastvae.accelerate(vae, freeze=freeze)
    vae.encoder(pixels())
    after = vae.state_dict()
    assert list(after) == list(before)
    for name, (value, strides) in before.items():
        assert torch.equal(after[name], value)
        assert after[name].stride() == strides
    save_file(after, tmp_path / "vae.safetensors")
    assert load_file(tmp_path / "vae.safetensors").keys() == before.keys()


@pytest.mark.parametrize("library", short_run(LIBRARIES, ["diffusers"]))
def test_a_saved_model_is_stock(library, tmp_path):
    vae = fastvae.accelerate(tiny(library), freeze=True)
    vae.encoder(pixels())
    vae.save_pretrained(tmp_path)
    stock = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(stock.encoder(pixels()), tiny(library).encoder(pixels()))


def through_pickle(vae):
    return pickle.loads(pickle.dumps(vae))


def through_torch_save(vae):
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("library", "copied"),
    short_run(
        [(library, copied) for library in LIBRARIES for copied in (through_pickle, through_torch_save)],
        [("diffusers", through_pickle)],
    ),
)
def test_a_pickled_copy_comes_back_stock(library, copied):
    vae = fastvae.accelerate(tiny(library), freeze=True)
    fast = vae.encoder(pixels())
    twin = copied(vae)
    assert torch.equal(twin.encoder(pixels()), tiny(library).encoder(pixels()))
    with pytest.raises(ValueError, match="not accelerated"):
        fastvae.fast_report(twin)
    fastvae.accelerate(twin, freeze=True)
    assert torch.equal(twin.encoder(pixels()), fast)
    assert fastvae.fast_report(twin)["rows"] == 1


@pytest.mark.parametrize("freeze", short_run([False, True], [True]))
def test_a_deep_copy_is_fast_and_independent(freeze):
    vae, other = fastvae.accelerate(tiny(**ONE_BLOCK), freeze=freeze), tiny(seed=1, **ONE_BLOCK)
    fast = vae.encoder(pixels())
    twin = copy.deepcopy(vae)
    loaded(twin, other)
    fastvae.refresh(twin)
    assert_computes(twin, other)
    assert [fastvae.fast_report(model)["rows"] for model in (vae, twin)] == [1, 2]
    fastvae.restore(twin)
    assert torch.equal(twin.encoder(pixels()), other.encoder(pixels()))
    assert torch.equal(vae.encoder(pixels()), fast)


def test_a_shared_weight_and_one_without_bias_are_taken():
    vae, other = tiny(), tiny()
    for model in (vae, other):
        block = model.encoder.mid_block
        block.resnets[1].conv1.weight = block.resnets[0].conv1.weight
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.bias = None
    assert_computes(fastvae.accelerate(vae), other)


def test_weights_that_cannot_take_the_shared_form_are_safe_without_a_refresh():
    """W_q^T W_k leaves fp16's range although W_q and W_k do not: unfrozen weights never take the shared form."""
    vae, x = fastvae.accelerate(tiny(**ONE_BLOCK).half()), pixels().half()
    vae.encoder(x)
    attention = vae.encoder.mid_block.attentions[0]
    for projection in (attention.to_q, attention.to_k):
        projection.weight.data.mul_(2000)
    assert not (attention.to_q.weight.mT @ attention.to_k.weight).isfinite().all()
    assert vae.encoder(x).isfinite().all()
    frozen = fastvae.accelerate(vae, freeze=True)
    assert frozen.encoder(x).isfinite().all(), "decided again, for the plain form"
