"""The kept decisions on a part: every change that decides is noticed, and an unchanged part costs next to nothing."""

import copy
import sys

import pytest
import torch
from fast.small_models import pixels
from torch import nn
from torch.nn.utils import parametrize

import fastvae
from fastvae.fast.fallback_reasons import needs_gradient
from fastvae.fast.survey import Survey


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Subclass(torch.Tensor):
    pass


def model(blocks=1, **config):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * blocks, "norm_num_groups": 2, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    return fastvae.AutoencoderKL(**kinds, **{**sizes, **config}).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def stock():
    return model(2).encoder


def resnet(part):
    return part.down_blocks[0].resnets[0]


def data(place, new):
    """Return a change that replaces the data of one weight by new(data)."""

    def change(part):
        weight = place(part)
        weight.data = new(weight.data)

    return change


def other_class(part):
    class OtherSiLU(nn.SiLU):
        pass

    part.conv_act.__class__ = OtherSiLU


CHANGES = {
    "a layer replaced": lambda part: setattr(resnet(part), "conv1", nn.Conv2d(8, 8, 3, padding=1)),
    "a layer replaced by an equal one": lambda part: setattr(part, "conv_in", copy.deepcopy(part.conv_in)),
    "a layer of a list replaced": lambda part: part.mid_block.attentions[0].to_out.__setitem__(1, nn.Dropout(0.5)),
    "a layer added": lambda part: resnet(part).add_module("adapter", nn.Identity()),
    "a layer taken away": lambda part: delattr(part, "mid_block"),
    "an optional layer taken away": lambda part: setattr(part.down_blocks[0], "downsamplers", None),
    "a block appended": lambda part: part.down_blocks.append(copy.deepcopy(part.down_blocks[0])),
    "forward hook": lambda part: resnet(part).conv1.register_forward_hook(print),
    "forward pre-hook": lambda part: part.down_blocks.register_forward_pre_hook(print),
    "backward hook": lambda part: part.conv_act.register_full_backward_hook(print),
    "backward pre-hook": lambda part: resnet(part).register_full_backward_pre_hook(print),
    "forward on the instance": lambda part: setattr(resnet(part).norm1, "forward", lambda x: x),
    "another class": other_class,
    "processor": lambda part: setattr(part.mid_block.attentions[0], "processor", object()),
    "number of groups": lambda part: setattr(resnet(part).norm1, "num_groups", 4),
    "eps": lambda part: setattr(part.conv_norm_out, "eps", 0.5),
    "stride": lambda part: setattr(resnet(part).conv2, "stride", (2, 2)),
    "scale of a block": lambda part: setattr(resnet(part), "output_scale_factor", 2.0),
    "a tensor for a number": lambda part: setattr(part.conv_in, "in_channels", torch.ones(2)),
    "training mode": lambda part: resnet(part).train(),
    "dropout": lambda part: setattr(resnet(part).dropout, "p", 0.5),
    "a weight moved": data(lambda part: part.conv_in.weight, torch.clone),
    "a bias moved": data(lambda part: resnet(part).conv1.bias, torch.clone),
    "a weight replaced": lambda part: setattr(part.conv_in, "weight", nn.Parameter(torch.ones(8, 3, 3, 3))),
    "a bias taken away": lambda part: setattr(resnet(part).conv1, "bias", None),
    "a weight of a subclass": lambda part: part.conv_in._parameters.update(weight=torch.ones(2).as_subclass(Subclass)),
    "another dtype in place": data(lambda part: resnet(part).conv1.weight, lambda w: w.view(torch.int32)),
    "another dtype of all": lambda part: part.half(),
    "other strides in place": data(lambda part: resnet(part).conv1.weight, lambda w: w.transpose(0, 1)),
    "another shape in place": data(lambda part: resnet(part).conv1.weight, lambda w: w[:4]),
    "a bias of one value": data(lambda part: resnet(part).conv1.bias, lambda b: b[:1].expand(8)),
    "another layout": lambda part: part.to(memory_format=torch.channels_last),
    "the meta device": lambda part: part.to("meta"),
    "a parametrisation": lambda part: parametrize.register_parametrization(resnet(part).conv1, "weight", Half()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(stock, change):
    part = copy.deepcopy(stock)
    survey = Survey(part)
    assert survey.fused
    assert survey.holds(part), "else nothing would ever be kept"
    change(part)
    assert not survey.holds(part)
    again = Survey(part)
    assert again.holds(part), "the new decision is kept in turn"


def test_what_the_user_may_change_at_every_call_is_no_change(stock):
    part = copy.deepcopy(stock)
    survey = Survey(part)
    for weight in part.parameters():
        weight.data.mul_(2)
        weight.requires_grad_(True)
    assert survey.holds(part), "a write in place; gradients are asked for at every call"
    assert needs_gradient(part, torch.zeros(1))
    with torch.no_grad():
        assert not needs_gradient(part, torch.zeros(1))
    assert not survey.holds(copy.deepcopy(part)), "it is one part's"


def test_the_last_of_many_weights_asks_for_a_gradient(stock):
    part = copy.deepcopy(stock)
    assert not needs_gradient(part, torch.zeros(1))
    assert needs_gradient(part, torch.zeros(1, requires_grad=True))
    for weight in (part.conv_in.weight, part.conv_out.bias, part.mid_block.attentions[0].to_out[0].bias):
        weight.requires_grad_(True)
        assert needs_gradient(part, torch.zeros(1))
        weight.requires_grad_(False)


def test_a_hook_of_all_modules_is_noticed(stock):
    survey = Survey(stock)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not survey.holds(stock)
    finally:
        hook.remove()
    assert survey.holds(stock)


def test_another_forward_of_a_class_is_noticed(stock, monkeypatch):
    survey = Survey(stock)
    monkeypatch.setattr(type(resnet(stock)), "forward", lambda self, x, temb=None: x)
    assert not survey.holds(stock)
    monkeypatch.undo()
    assert survey.holds(stock)
    monkeypatch.setattr(type(stock.mid_block.attentions[0].processor), "__call__", lambda *_: None)
    assert not survey.holds(stock)


def test_a_hook_that_moves_to_another_layer_is_noticed(stock):
    part = copy.deepcopy(stock)
    hook = resnet(part).register_forward_hook(lambda *_: None)
    survey = Survey(part)
    assert survey.holds(part)
    assert not survey.fused
    hook.remove()
    part.conv_in.register_forward_hook(lambda *_: None)
    assert not survey.holds(part)
    assert survey.why_not is not Survey(part).why_not


def calls_of(function):
    """Return the number of calls of Python functions and of C functions from Python."""
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def test_a_call_without_a_change_asks_no_layer():
    """The old decision took some 30 calls a layer. The time is measured by bench/timing/test_networks.py."""
    counts = []
    for blocks in (1, 4):
        part = model(blocks).encoder
        survey = Survey(part)
        assert survey.holds(part)
        counts.append(calls_of(lambda part=part, survey=survey: survey.holds(part)))
    assert counts[0] == counts[1] < 40, "the number does not depend on the model"


def test_a_path_decides_once(stock, monkeypatch):
    vae = fastvae.accelerate(model(1))
    made = []
    monkeypatch.setattr("fastvae.fast.fast_path.Survey", lambda part: made.append(part) or Survey(part))
    x = pixels(vae, 1, 4, 4)
    for _ in range(3):
        vae.encode(x)
    assert len(made) == 1
    vae.encoder.conv_norm_out.eps = 0.5
    vae.encode(x)
    vae.encode(x)
    assert len(made) == 2
    twin = copy.deepcopy(vae)
    assert not twin._fastvae.surveys
