"""Attention processors and fused projections compared with diffusers'."""

import pytest
import torch
from support.twins import CONFIGS, images, twins

from fastvae.models import AttnProcessor2_0, FusedAttnProcessor2_0


@torch.no_grad()
def test_fused_projections_and_back():
    ours, theirs = twins(**CONFIGS["attention-in-blocks"])
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    x = images(2, 3, 16, 24)
    plain = ours(x).sample
    ours.unfuse_qkv_projections()  # without a fuse before, nothing happens; diffusers raises AttributeError
    ours.fuse_qkv_projections()
    theirs.fuse_qkv_projections()
    assert all(isinstance(p, FusedAttnProcessor2_0) for p in ours.attn_processors.values())
    assert torch.equal(ours(x).sample, theirs(x).sample)
    ours.unfuse_qkv_projections()
    assert set(ours.state_dict()) == set(before), "a stray key is left"
    assert torch.equal(ours(x).sample, plain)


@torch.no_grad()
def test_attention_processors():
    ours, theirs = twins(**CONFIGS["attention-in-blocks"])
    assert set(ours.attn_processors) == set(theirs.attn_processors)
    calls = []

    class Counting(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, **kwargs):
            calls.append(attn)
            return super().__call__(attn, hidden_states, **kwargs)

    x = images(1, 3, 16, 16)
    plain = ours(x).sample
    ours.set_attn_processor(Counting())
    assert torch.equal(ours(x).sample, plain)
    assert len(calls) == len(ours.attn_processors)
    ours.set_attn_processor({name: AttnProcessor2_0() for name in ours.attn_processors})
    with pytest.raises(ValueError, match="processor must name the"):
        ours.set_attn_processor({"nowhere.processor": AttnProcessor2_0()})
    ours.set_default_attn_processor()
    assert torch.equal(ours(x).sample, plain)

    class Foreign:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    ours.set_attn_processor(Foreign())
    with pytest.raises(ValueError, match="Foreign"):
        ours.set_default_attn_processor()
