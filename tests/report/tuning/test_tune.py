"""fastvae tune on planted forms and times: it takes the faster form, refuses a wrong one, and may be killed."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastvae
from fastvae.cli.main import cli
from fastvae.fast.cpu.cpu_pass import CpuPass
from fastvae.fast.forms import tables
from fastvae.fast.forms.form import DIRECT_ONLY, Form
from fastvae.report.tuning import measure, network
from fastvae.report.tuning.tune import tune

CPU = torch.device("cpu")
SIZE = 16
# Seconds of a call in each form: as planted.
PLANTED = {"direct": 3.0, "winograd2": 2.0, "winograd4": 1.0}
ROUNDS = [0.99, 1.0, 1.0, 1.0, 1.0, 1.01]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = fastvae.AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=2, layers_per_block=1)
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def errors(tmp_path, monkeypatch):
    """Plant forms with relative errors and times; return the errors, by form, for a test to change."""
    errors = {Form.WINOGRAD2: 1e-8, Form.WINOGRAD4: 1e-7}
    monkeypatch.setenv("FASTVAE_CACHE", str(tmp_path / "fastvae"))
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr(network, "SIZES", (SIZE, 2 * SIZE))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.clear()
    plain = CpuPass.resnet

    def resnet(self, block, activation, pad):
        # A block has the form of its first convolution, and each planted form its own error.
        pixels = activation.x.shape[2] * activation.x.shape[3]
        form = self.forms.of(block.conv1.weight, pixels)
        self.forms, forms = DIRECT_ONLY, self.forms
        done = plain(self, block, activation, pad)
        self.forms = forms
        return done._replace(x=done.x * (1 + errors[form]) + errors[form]) if form in errors else done

    monkeypatch.setattr(CpuPass, "resnet", resnet)
    monkeypatch.setattr("fastvae_kernels.cpu.winograd.takes", lambda weight: False)  # planted forms alone
    monkeypatch.setattr(measure, "interleaved", planted)
    monkeypatch.setattr("fastvae.report.tuning.tune.interleaved", planted)
    yield errors
    tables.clear()


def planted(calls, device, budget):
    return {form: [PLANTED.get(form, 1.0) * share for share in ROUNDS] for form in calls}


def tuned(model, **given):
    return tune(model, sizes=(SIZE,), dtype="fp32", device="cpu", **given)


def forms_of(results):
    return {f"{layer['layer']} {layer['pixels']}": layer["form"] for layer in results["layers"]}


def test_the_faster_form_is_taken_where_there_is_one(model, errors):
    results = tuned(model)
    forms = forms_of(results)
    # A layer whose form changes no bit has no such form: second convolutions here, and upsampling ones.
    assert forms["conv 8>8 float32 256"] == forms["conv 8>16 float32 64"] == "winograd4"
    assert forms["upsample 16>16 float32 256"] == "direct"
    assert all(check["largest"] <= 1 and check["rms"] <= 1 for check in results["checks"])
    assert [(check["task"], check["size"]) for check in results["checks"]] == [
        ("encode", SIZE), ("decode", SIZE), ("encode", 2 * SIZE), ("decode", 2 * SIZE),
    ]  # fmt: skip
    found = tables.forms_of(CPU)
    weight = torch.empty(8, 8, 3, 3)
    assert [found.of(weight, pixels) for pixels in (255, 256, 10**6)] == [Form.DIRECT, *[Form.WINOGRAD4] * 2]
    assert results["digest"] == found.digest
    layer = next(layer for layer in results["layers"] if layer["layer"] == "conv 8>8 float32")
    assert layer["milliseconds"] == {form: 1e3 * taken for form, taken in PLANTED.items()}
    assert layer["error_ratio"]["direct"] < 2


@pytest.mark.parametrize("faster", [0.995, 1.0, 1.5], ids=["within the noise", "as fast", "slower"])
def test_a_form_that_is_not_clearly_faster_is_not_taken(model, errors, monkeypatch, faster):
    monkeypatch.setitem(PLANTED, "winograd2", 3.0 * faster)
    monkeypatch.setitem(PLANTED, "winograd4", 3.0 * faster)
    assert set(forms_of(tuned(model)).values()) == {"direct"}


def test_a_wrong_form_is_refused_however_fast_it_is(model, errors):
    errors[Form.WINOGRAD4] = 0.01
    said = []
    results = tuned(model, say=said.append)
    assert set(forms_of(results).values()) == {"direct", "winograd2"}
    refused = [layer for layer in results["layers"] if layer["refused"]]
    assert {layer["form"] for layer in refused} == {"winograd2"}
    assert all(layer["error_ratio"]["winograd4"] > 1000 for layer in refused), "the error is printed, too"
    assert any(line.startswith("refuse  winograd4 for conv ") and "of what is allowed" in line for line in said)
    errors[Form.WINOGRAD2] = 0.01
    assert set(forms_of(tuned(model, again=True)).values()) == {"direct"}


def test_a_result_that_is_not_finite_is_refused(model, errors):
    errors[Form.WINOGRAD4] = float("inf")
    assert set(forms_of(tuned(model)).values()) == {"direct", "winograd2"}


def test_a_form_beside_an_exact_eager_torch_has_a_ratio(errors, monkeypatch, tmp_path):
    """Second convolutions of zeros: the residual alone is left, and eager torch is exact."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = fastvae.AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1)
    for name, weight in vae.named_parameters():
        if ".conv2." in name:
            torch.nn.init.zeros_(weight)
    vae.save_pretrained(tmp_path / "model")
    results = tuned(str(tmp_path / "model"))
    ratios = next(layer["error_ratio"] for layer in results["layers"] if layer["layer"] == "conv 8>8 float32")
    assert (ratios["direct"], ratios["winograd4"]) == (1.0, None)
    json.dumps(results, allow_nan=False)


def test_a_ratio_that_is_not_finite_is_the_same_from_the_journal(model, errors):
    errors[Form.WINOGRAD4] = float("inf")
    first = tuned(model)
    assert {**tuned(model), "won": None} == {**first, "won": None}
    assert {layer["error_ratio"].get("winograd4") for layer in first["layers"]} == {None}


def test_measurements_without_the_c_kernels_are_made_again(model, errors, monkeypatch):
    monkeypatch.setattr("fastvae_kernels.cpu.library.why_not", lambda: "the C kernels are not built")
    tuned(model)
    monkeypatch.setattr("fastvae_kernels.cpu.library.why_not", lambda: None)
    measured = []
    monkeypatch.setattr(measure, "interleaved", lambda *given: measured.append(given) or planted(*given))
    assert len(tuned(model)["layers"]) == len(measured)


def test_a_model_that_is_wrong_without_any_form_is_an_error(model, errors, monkeypatch):
    monkeypatch.setattr("fastvae.fast.cpu.cpu_pass.group_norm_silu", lambda norm, x, **_: x)
    with pytest.raises(
        ValueError, match=r"vae must be right with the direct form alone, got encode 16x16: .* fastvae doctor"
    ):
        tuned(model)
    assert not tables.has_table(CPU)


def test_a_second_run_measures_nothing_and_writes_the_same(model, errors, monkeypatch):
    first = tuned(model)
    written = Path(first["table"]).read_text()
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(network.Check, "verdict", lambda *_: pytest.fail("checked again"))
    second = tuned(model)
    assert Path(second["table"]).read_text() == written
    assert {**second, "won": None} == {**first, "won": None}


def test_entries_of_other_layers_stay(model, errors, tmp_path):
    path = tables.users_table(os.path.basename(tuned(model)["table"]).removesuffix(".json"))
    table = json.loads(path.read_text())
    other = {**table["entries"][0], "dtype": "bfloat16", "form": "winograd2"}
    table["entries"] = [other, {**table["entries"][0], "form": "direct"}]
    path.write_text(json.dumps(table))
    tuned(model)
    kept = json.loads(path.read_text())["entries"]
    assert other in kept
    assert len(kept) == 1 + len({(line["kind"], line["inputs"], line["outputs"], line["pixels"]) for line in kept[1:]})


def test_a_killed_run_goes_on_where_it_was(model, errors, monkeypatch, tmp_path):
    """Killed in the middle of a measurement: no table, and what was measured is not measured again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        measured = []

        def killed(*given):
            measured.append(given)
            if len(measured) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return planted(*given)

        measure.interleaved = killed
        tuned(model)
        os._exit(1)
    os.close(writer)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    os.close(reader)
    assert not tables.has_table(CPU)
    names = sorted(path.name for path in (tmp_path / "fastvae" / "forms").iterdir())
    assert [name.endswith(".journal.json") for name in names] == [True], "whole, and nothing half written"
    measured = []
    monkeypatch.setattr(measure, "interleaved", lambda *given: measured.append(given) or planted(*given))
    results = tuned(model)
    assert len(measured) == len(results["layers"]) - 3


def test_other_versions_are_measured_again(model, errors, monkeypatch):
    tuned(model)
    measured = []
    monkeypatch.setattr(measure, "interleaved", lambda *given: measured.append(given) or planted(*given))
    monkeypatch.setattr("fastvae.report.tuning.tune.versions", lambda: {"torch": "99"})
    results = tuned(model)
    assert len(measured) == len(results["layers"])


def test_sizes_and_models_that_cannot_be_tuned(model, errors, monkeypatch):
    with pytest.raises(ValueError, match="sizes must be multiples of the model's 2 pixels per latent, got 15"):
        tune(model, sizes=(16, 15), device="cpu", dtype="fp32")
    refused = "vae must take the fast path, but its encoder runs as a module: autocast"
    with torch.autocast("cpu"), pytest.raises(ValueError, match=refused):
        tuned(model)


def test_the_command_prints_the_table_or_one_document(model, errors):
    arguments = ["tune", "--vae", model, "--size", str(SIZE), "--dtype", "fp32", "--device", "cpu"]
    told = CliRunner().invoke(cli, [*arguments, "-q"])
    assert told.exit_code == 0, told.output
    assert not told.stderr
    lines = told.stdout.splitlines()
    assert lines[0].split() == ["layer", "pixels", "direct", "ms", "winograd2", "error", "winograd4", "error"]
    row = next(line for line in lines if line.startswith("conv 8>8 float32")).split()
    assert row[2:4] == ["float32", "256"]
    assert (row[4], row[5:7], row[8:10], row[-1]) == ("3,000", ["x", "1.50"], ["x", "3.00"], "winograd4")
    assert lines[-1] == f"written: {tables.users_table(tables.name_of(CPU))}"
    document = json.loads(CliRunner().invoke(cli, [*arguments, "--json", "-q"]).stdout, parse_constant=pytest.fail)
    assert document["title"] == "fastvae tune"
    assert {layer["form"] for layer in document["layers"]} == {"direct", "winograd4"}
