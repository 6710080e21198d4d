"""Weights that move: written in place, recast, saved, copied, and seen by the next call; frozen ones after refresh."""

import copy
import io
import pickle

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from fast.small_models import LIBRARIES, TWO, small_model
from safetensors.torch import load_file, save_file
from support.accuracy import assert_as_accurate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae.fast.fallback_reasons import Reason

SMALL = {**TWO, "block_out_channels": (8, 16), "norm_num_groups": 1, "layers_per_block": 1}
WHERE = "encoder.mid_block.resnets.0.conv1.weight"


def tiny(hand="fastvae", seed=0):
    torch.manual_seed(seed)
    return getattr(LIBRARIES[hand], "AutoencoderKL")(**SMALL).eval().requires_grad_(False)  # noqa: B009


def pixels(dtype=torch.float32):
    return (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)


def assert_computes(vae, weights, dtype=torch.float32):
    """The accelerated encoder computes with the weights of another model, in this dtype; its output is returned."""
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


# Ways in which training scripts write weights: each takes a model, and one whose weights it shall have.


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
    """EMAModel's way around a validation: the averages in, and the model's own out again."""
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


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen_by_the_next_call(name):
    vae, other = fastvae.accelerate(tiny("diffusers")), tiny("diffusers", seed=1)
    before = vae.encoder(pixels())
    WRITES[name](vae, other)
    assert not torch.allclose(assert_computes(vae, other), before)


@pytest.mark.parametrize("name", ["through data", "averaged", "loaded", "made in inference mode"])
def test_a_write_to_frozen_weights_is_seen_after_refresh(name):
    vae, other = fastvae.accelerate(tiny(), freeze=True), tiny(seed=1)
    before = vae.encoder(pixels())
    assert fastvae.fast_report(vae)["packed_bytes"] > 0
    WRITES[name](vae, other)
    assert fastvae.refresh(vae) is vae
    assert fastvae.fast_report(vae)["packed_bytes"] == 0
    assert not torch.allclose(assert_computes(vae, other), before)


@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("hand", LIBRARIES)
def test_recast_and_back(hand, freeze):
    """SDXL's pipelines do this within one call; frozen weights are packed for each dtype."""
    vae, plain = fastvae.accelerate(tiny(hand).half(), freeze=freeze), tiny(hand).half()
    for dtype in (torch.float16, torch.float32, torch.float16):
        vae.to(dtype)
        assert_computes(vae, plain, dtype)


def test_a_model_that_was_away_and_came_back():
    """On the meta device nothing can be kept of it; what is loaded then is what counts."""
    vae, other = fastvae.accelerate(tiny()), tiny(seed=1)
    vae.encoder(pixels())
    vae.to("meta")
    assert set(fastvae.explain(vae).reasons.values()) == {Reason.META}
    vae.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert_computes(vae, other)


def test_weights_packed_in_inference_mode_serve_outside_it():
    vae = fastvae.accelerate(tiny(), freeze=True)
    with torch.inference_mode():
        inside = vae.encoder(pixels())
    assert torch.equal(vae.encoder(pixels()), inside)
    x = pixels().requires_grad_()
    assert torch.autograd.grad(vae.encoder(x).sum(), x)[0].abs().max() > 0


def test_weights_packed_under_a_fake_mode_are_not_kept():
    """They have no values, and a call after it would give a fake tensor."""
    vae, x = fastvae.accelerate(small_model("CogView: no attention, two residual blocks"), freeze=True), torch.ones(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae.encoder(torch.empty(1, 3, 4, 4))
    assert fastvae.fast_report(vae)["packed_bytes"] == 0
    assert type(vae.encoder(x.expand(1, 3, 4, 4))) is torch.Tensor


def test_a_refresh_by_another_thread_takes_nothing_from_a_call():
    class Forgetful(dict):
        """Somebody refreshes after every question whether something is there."""

        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    vae = fastvae.accelerate(tiny(), freeze=True)
    before = vae.encoder(pixels())
    derived = vars(vae)["_fastvae"].packed
    derived.kept, derived.shared = Forgetful(derived.kept), Forgetful(derived.shared)
    assert torch.equal(vae.encoder(pixels()), before)


@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("hand", LIBRARIES)
def test_the_state_dict_is_that_of_before(hand, freeze, tmp_path):
    """Same keys, values and strides, so safetensors takes it: it refuses channels_last."""
    vae = tiny(hand)
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


@pytest.mark.parametrize("hand", LIBRARIES)
def test_a_saved_model_is_stock(hand, tmp_path):
    vae = fastvae.accelerate(tiny(hand), freeze=True)
    vae.encoder(pixels())
    vae.save_pretrained(tmp_path)
    stock = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(stock.encoder(pixels()), tiny(hand).encoder(pixels()))


def through_pickle(vae):
    return pickle.loads(pickle.dumps(vae))


def through_torch_save(vae):
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save])
@pytest.mark.parametrize("hand", LIBRARIES)
def test_a_pickled_copy_comes_back_stock(hand, copied):
    vae = fastvae.accelerate(tiny(hand), freeze=True)
    fast = vae.encoder(pixels())
    twin = copied(vae)
    assert torch.equal(twin.encoder(pixels()), tiny(hand).encoder(pixels()))
    with pytest.raises(ValueError, match="not accelerated"):
        fastvae.fast_report(twin)
    fastvae.accelerate(twin, freeze=True)
    assert torch.equal(twin.encoder(pixels()), fast)
    assert fastvae.fast_report(twin)["rows"] == 1


@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
def test_a_deep_copy_is_fast_and_independent(freeze):
    vae, other = fastvae.accelerate(tiny(), freeze=freeze), tiny(seed=1)
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
    """W_q^T W_k leaves fp16's range where W_q and W_k do not: what moves never takes the form that multiplies them."""
    vae, x = fastvae.accelerate(tiny().half()), pixels().half()
    vae.encoder(x)
    attention = vae.encoder.mid_block.attentions[0]
    for projection in (attention.to_q, attention.to_k):
        projection.weight.data.mul_(2000)
    assert not (attention.to_q.weight.mT @ attention.to_k.weight).isfinite().all()
    assert vae.encoder(x).isfinite().all()
    frozen = fastvae.accelerate(vae, freeze=True)
    assert frozen.encoder(x).isfinite().all(), "decided anew, for the plain form"
