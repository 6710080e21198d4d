"""explain names the form of each convolution, and why."""

import re

import pytest
import torch

import fastvae
from fastvae.fast import fallback_reasons
from fastvae.fast.forms import tables
from fastvae.fast.forms.form import Entry, Form, Forms
from fastvae.fast.forms.shapes import convolutions_of

SHAPE = (1, 3, 16, 16)
CPU = torch.device("cpu")


@pytest.fixture
def vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = fastvae.AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=2, layers_per_block=1)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=["fused", "on a CPU"])
def either_path(request, monkeypatch):
    """Take one of the two paths, and return the form of upsampling that it has and the one that it has not."""
    if request.param == "on a CPU":
        monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
        monkeypatch.setattr("fastvae_kernels.cpu.winograd.takes", lambda weight: True)
        monkeypatch.setattr("fastvae_kernels.cpu.library.build_name", lambda: "built for AVX2")
        return Form.WINOGRAD4, Form.FOUR_TAPS
    return Form.FOUR_TAPS, Form.WINOGRAD4


def test_the_table_gives_each_layer_its_form(vae, either_path, monkeypatch):
    entries = [
        Entry("conv", 8, 8, "float32", 256, Form.WINOGRAD2),
        Entry("conv", 16, 16, "float32", 65, Form.WINOGRAD4),
        Entry("upsample", 16, 16, "float32", 256, either_path[0]),
    ]
    monkeypatch.setattr(tables, "_forms_of", lambda name: Forms(entries))
    monkeypatch.setattr(tables, "has_table", lambda device: True)
    explanation = fastvae.explain(fastvae.accelerate(vae, freeze=True), SHAPE)
    forms = {row.name: (row.form, row.why) for row in explanation.forms}
    on_cpu = "; the C kernel built for AVX2" if either_path[0] is Form.WINOGRAD4 else ""
    why = f"by the table, from 256 pixels on{on_cpu}"
    assert forms["encoder.down_blocks.0.resnets.0.conv1"] == (Form.WINOGRAD2, why)
    assert forms["decoder.up_blocks.0.upsamplers.0.conv"] == (either_path[0], why)
    form, why = forms["encoder.mid_block.resnets.0.conv1"]  # of 64 pixels
    assert form is Form.DIRECT
    assert why == f"the table of {tables.name_of(CPU)} has no entry for it at this size: fastvae tune"
    assert not any("downsamplers" in name or "conv_out" in name for name in forms)
    assert re.search(r"\nencoder.down_blocks.0.resnets.0.conv1 +winograd2 +by the table, from 256", str(explanation))


def test_a_form_that_the_path_lacks_is_said_to_be_missing(vae, either_path, monkeypatch):
    entry = Entry("upsample", 16, 16, "float32", 256, either_path[1])
    monkeypatch.setattr(tables, "_forms_of", lambda name: Forms([entry]))
    rows = fastvae.explain(fastvae.accelerate(vae, freeze=True), SHAPE).forms
    found = next((row.form, row.why) for row in rows if "upsamplers" in row.name)
    assert found == (Form.DIRECT, f"this path has no {either_path[1]} for it")


def test_a_form_that_the_c_kernels_lack_is_said_to_be_missing(vae, monkeypatch):
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae_kernels.cpu.winograd.takes", lambda weight: False)
    monkeypatch.setattr(tables, "_forms_of", lambda name: Forms([Entry("conv", 8, 8, "float32", 64, Form.WINOGRAD4)]))
    for why in ("they were not built", None):
        monkeypatch.setattr("fastvae_kernels.cpu.library.why_not", lambda why=why: why)
        rows = fastvae.explain(fastvae.accelerate(vae), SHAPE).forms
        found = next((row.form, row.why) for row in rows if row.name == "encoder.down_blocks.0.resnets.0.conv1")
        assert found == (Form.DIRECT, why or "no C kernel takes its channels and dtype")


@pytest.mark.usefixtures("either_path")
def test_one_line_where_all_are_direct_for_one_reason(vae, monkeypatch):
    monkeypatch.setattr(tables, "_forms_of", lambda name: Forms())
    monkeypatch.setattr(tables, "has_table", lambda device: False)
    changing = fastvae.explain(fastvae.accelerate(vae), SHAPE)
    none = f"there is no table for {tables.name_of(CPU)}: fastvae tune"
    fused = "cpu" in fallback_reasons.KERNEL_DEVICES  # weights that may change take forms on a CPU's own path alone
    why = "weights that may change take no other form: freeze=True" if fused else none
    assert str(changing).splitlines()[-1] == f"all {len(changing.forms)} convolutions: direct: {why}"
    frozen = fastvae.explain(fastvae.accelerate(vae, freeze=True), SHAPE)
    assert str(frozen).endswith(f"direct: {none}")


def test_a_call_without_forms_names_none(vae):
    assert not fastvae.explain(fastvae.accelerate(vae, precision="exact"), SHAPE).forms
    fastvae.accelerate(vae).requires_grad_(True)
    assert not fastvae.explain(vae, SHAPE).forms, "a gradient takes the direct form"


def test_the_sizes_are_those_of_a_call(vae, monkeypatch):
    """Odd sizes too: the shape of each convolution's output, as hooks see it."""
    x, z = torch.zeros(1, 3, 18, 14), torch.zeros(1, 4, 5, 3)
    for part, given in ((vae.encoder, x), (vae.decoder, z)):
        seen = {}

        def see(module, _, y, seen=seen):
            seen[module] = y.shape[2] * y.shape[3]

        hooks = [conv.register_forward_hook(see) for conv in part.modules() if isinstance(conv, torch.nn.Conv2d)]
        part(given)
        for hook in hooks:
            hook.remove()
        found = convolutions_of(part, given)
        assert {layer.conv: layer.pixels for layer in found} == {
            conv: pixels
            for conv, pixels in seen.items()
            if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv not in (part.conv_in, part.conv_out)
        }
