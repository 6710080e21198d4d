"""Identity of an accelerated model: type, config, saved files and copies are those of stock."""

import copy
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import accelerate.state
import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from swap_in.stock import (
    Walks,
    assert_computes_like,
    assert_same_bits,
    both_ways,
    fast_and_stock,
    is_accelerated,
    moments_of,
    pixels,
    tiny,
    tiny_pipeline,
)

import fastvae

pytestmark = pytest.mark.usefixtures("users_cpu")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Pipelines keep it and save the same files.


@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_from_pipe_keeps_the_vae(accelerated, monkeypatch):
    """from_pipe compares the exact type of a component and leaves out an instance of a subclass."""
    pipe, stock = tiny_pipeline(), tiny()
    if accelerated == "before":
        fastvae.accelerate(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    if accelerated == "after":
        fastvae.accelerate(other)
    assert other.vae is pipe.vae
    assert type(other.vae) is diffusers.AutoencoderKL
    walks = Walks(monkeypatch)
    assert_computes_like(other.vae, stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    back = diffusers.StableDiffusionPipeline.from_pipe(other)
    assert_same_bits(fastvae.restore(back).vae, stock)
    assert not walks.taken()


@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
def test_a_pipeline_is_written_byte_for_byte_as_before(freeze, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "before")
    fastvae.accelerate(pipe, freeze=freeze)
    both_ways(pipe.vae)
    pipe.save_pretrained(tmp_path / "during")
    fastvae.restore(pipe).save_pretrained(tmp_path / "after")
    before = files_of(tmp_path / "before")
    assert json.loads(before["model_index.json"])["vae"] == ["diffusers", "AutoencoderKL"]
    assert {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"} <= set(before)
    assert files_of(tmp_path / "during") == before
    assert files_of(tmp_path / "after") == before


@pytest.mark.parametrize("library", ["diffusers", "fastvae"])
@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=["variant", "shards"])
def test_a_model_is_written_byte_for_byte_as_before(library, options, tmp_path):
    vae, stock = fast_and_stock(library, freeze=True)
    both_ways(vae)
    vae.save_pretrained(tmp_path / "ours", **options)
    stock.save_pretrained(tmp_path / "stock", **options)
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "stock")
    variant = {"variant": "fp16"} if "variant" in options else {}
    assert len(files_of(tmp_path / "ours")) > 2 or variant, "no shards were written"
    assert_same_bits(diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", **variant), tiny(library))


# Another process, in which fastvae cannot be imported.

WITHOUT_FASTVAE = """
import json, pickle, sys
sys.modules["fastvae"] = sys.modules["fastvae_kernels"] = None
import diffusers, torch
torch.set_num_threads(1)
folder = sys.argv[1]
x = torch.load(f"{folder}/pixels.pt")
with open(f"{folder}/vae.pickle", "rb") as file:
    models = {"pickle": pickle.load(file)}
models["torch.save"] = torch.load(f"{folder}/vae.pt", weights_only=False)
absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
models["pipeline"] = diffusers.DiffusionPipeline.from_pretrained(f"{folder}/pipeline", **absent).vae
torch.save({name: vae.encode(x).latent_dist.parameters for name, vae in models.items()}, f"{folder}/moments.pt")
print(json.dumps({name: type(vae.encoder.forward.__self__).__module__ for name, vae in models.items()}))
"""


def save_everywhere(folder):
    """Save an accelerated pipeline and its VAE in ``folder``: saved pipeline, pickle, torch.save."""
    pipe = fastvae.accelerate(tiny_pipeline(), freeze=True)
    pipe.save_pretrained(folder / "pipeline")
    (folder / "vae.pickle").write_bytes(pickle.dumps(pipe.vae))
    torch.save(pipe.vae, folder / "vae.pt")


class WithoutFastvae(pickle.Unpickler):
    """An unpickler of a process that cannot import fastvae."""

    def find_class(self, module, name):
        if module.split(".")[0] in ("fastvae", "fastvae_kernels"):
            raise ModuleNotFoundError(f"No module named {module!r}")
        return super().find_class(module, name)


def test_what_is_saved_needs_no_fastvae(tmp_path):
    save_everywhere(tmp_path)
    with (tmp_path / "vae.pickle").open("rb") as file:
        models = [WithoutFastvae(file).load()]
    without = SimpleNamespace(Unpickler=WithoutFastvae, load=pickle.load, __name__="pickle")
    models.append(torch.load(tmp_path / "vae.pt", weights_only=False, pickle_module=without))
    models.append(diffusers.AutoencoderKL.from_pretrained(tmp_path / "pipeline" / "vae"))
    assert "fastvae" not in (tmp_path / "pipeline" / "model_index.json").read_text()
    stock = moments_of(tiny(), pixels())
    assert not torch.equal(stock, moments_of(fastvae.accelerate(tiny()), pixels())), "else nothing is shown"
    for vae in models:
        assert type(vae.encoder.forward.__self__).__module__ == "diffusers.models.autoencoders.vae"
        assert torch.equal(moments_of(vae, pixels()), stock)


@pytest.mark.slow
def test_a_process_without_fastvae_gets_a_stock_model(tmp_path):
    save_everywhere(tmp_path)
    torch.save(pixels(), tmp_path / "pixels.pt")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_FASTVAE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    moments, modules = torch.load(tmp_path / "moments.pt"), json.loads(done.stdout.splitlines()[-1])
    stock = moments_of(tiny(), pixels())
    assert set(moments) == {"pickle", "torch.save", "pipeline"}
    for way in moments:
        assert modules[way] == "diffusers.models.autoencoders.vae"
        assert torch.equal(moments[way], stock)


# Attributes of the model.


@pytest.mark.parametrize("library", ["diffusers", "fastvae"])
def test_the_config_is_that_of_before_and_may_be_changed(library):
    """The x4 upscaler registers a scaling factor after loading; fastvae adds nothing to the config."""
    vae, stock = fast_and_stock(library)
    assert vae.config == stock.config
    assert not hasattr(vae.config, "fastvae")
    for model in (vae, stock):
        model.register_to_config(scaling_factor=0.08333)
    assert vae.config == stock.config
    assert vae.config.scaling_factor == vae.config["scaling_factor"] == 0.08333
    ours, plain = (fastvae.encode_latents(model, pixels(), posterior="mode") for model in (vae, tiny(library)))
    torch.testing.assert_close(ours, plain * (0.08333 / 0.18215))
    assert is_accelerated(vae)
    fastvae.restore(vae)
    assert vae.config.scaling_factor == 0.08333


def test_a_config_makes_a_stock_model():
    vae = fastvae.accelerate(tiny())
    other = diffusers.AutoencoderKL.from_config(vae.config)
    assert not is_accelerated(other)
    assert type(vae).config_name == "config.json"


@pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")
def test_what_is_asked_of_the_model_is_answered_alike():
    """GLIGEN reads vae.sample_size, which comes from the config."""
    vae, stock = fast_and_stock()
    both_ways(vae)
    for name in ("dtype", "device", "sample_size", "is_gradient_checkpointing", "use_tiling", "_no_split_modules"):
        assert getattr(vae, name) == getattr(stock, name), name
    assert vae.num_parameters() == stock.num_parameters()
    assert vae.get_memory_footprint() == stock.get_memory_footprint()
    assert [name for name, _ in vae.named_modules()] == [name for name, _ in stock.named_modules()]
    assert [name for name, _ in vae.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in vae.named_buffers()] == [name for name, _ in stock.named_buffers()]
    assert repr(vae) == repr(stock)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vae.no_such_name


# Copies and weights.


def test_a_copied_pipeline_is_accelerated_separately(monkeypatch):
    pipe = fastvae.accelerate(tiny_pipeline(), freeze=True)
    both_ways(pipe.vae)
    twin, walks = copy.deepcopy(pipe), Walks(monkeypatch)
    assert twin.vae is not pipe.vae
    assert fastvae.fast_report(pipe)["packed_bytes"] > fastvae.fast_report(twin)["packed_bytes"] == 0
    assert_computes_like(twin.vae, tiny())
    assert walks.taken() == ["Encoder", "Decoder"]
    fastvae.restore(twin)
    assert_same_bits(twin.vae, tiny())
    assert not walks.taken()
    assert is_accelerated(pipe.vae)


@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_a_copy_of_one_part_is_fast_and_has_its_own_weights(which, monkeypatch):
    """Exporters copy only the encoder and replace the copy's forward."""
    vae = fastvae.accelerate(tiny())
    given = pixels() if which == "encoder" else both_ways(vae)[0][:, :4]
    part = copy.deepcopy(getattr(vae, which))
    walks = Walks(monkeypatch)
    assert torch.equal(part(given), getattr(vae, which)(given))
    assert len(walks.taken()) == 2
    part.conv_out.bias.data.add_(1)
    torch.testing.assert_close(part(given), getattr(vae, which)(given) + 1)
    own = part.forward
    part.forward = lambda sample: 2 * own(sample)
    torch.testing.assert_close(part(given), 2 * (getattr(vae, which)(given) + 1))


@pytest.mark.parametrize("library", ["diffusers", "fastvae"])
def test_weights_load_strictly_in_both_directions(library, monkeypatch):
    vae, other = fastvae.accelerate(tiny(library), freeze=True), tiny(library, seed=1)
    both_ways(vae)
    assert list(vae.state_dict()) == list(other.state_dict())
    assert str(vae.load_state_dict(other.state_dict(), strict=True)) == "<All keys matched successfully>"
    walks = Walks(monkeypatch)
    assert_computes_like(fastvae.refresh(vae), other)
    assert walks.taken() == ["Encoder", "Decoder"]
    stock = tiny(library)
    stock.load_state_dict(vae.state_dict(), strict=True)
    assert_same_bits(stock, other)


def test_an_average_of_weights_is_kept_saved_and_put_in_place(tmp_path, monkeypatch):
    vae, other, options = fastvae.accelerate(tiny()), tiny(seed=1), {"model_cls": diffusers.AutoencoderKL}
    vae.requires_grad_(True)  # what is frozen is not averaged
    average = EMAModel(vae.parameters(), decay=0.5, **options, model_config=vae.config)
    vae.load_state_dict(other.state_dict())
    for _ in range(3):
        average.step(vae.parameters())
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, **options)
    stock = tiny()
    for model in (vae, stock):
        loaded.copy_to(model.parameters())
    assert not torch.equal(stock.encoder.conv_in.weight, other.encoder.conv_in.weight)
    walks = Walks(monkeypatch)
    assert_computes_like(vae.requires_grad_(False), stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    assert_same_bits(diffusers.AutoencoderKL.from_pretrained(tmp_path), stock)


@pytest.fixture
def accelerator():
    """Return a factory of accelerate's Accelerator, and reset its process-wide state afterwards."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_and_unwrapped(precision, accelerator, monkeypatch):
    """prepare wraps the model's forward for mixed precision, and unwrap_model undoes it."""
    vae, stock = fast_and_stock()
    prepared_by = accelerator(mixed_precision=precision)
    prepared, plain = prepared_by.prepare(vae), prepared_by.prepare(stock)
    torch.testing.assert_close(prepared(pixels()).sample, plain(pixels()).sample)
    unwrapped = prepared_by.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is vae
    prepared_by.unwrap_model(plain, keep_fp32_wrapper=False)
    walks = Walks(monkeypatch)
    assert_computes_like(unwrapped, stock)
    assert walks.taken() == ["Encoder", "Decoder"]
    assert prepared_by.get_state_dict(prepared).keys() == tiny().state_dict().keys()
    assert_same_bits(fastvae.restore(unwrapped), tiny())


def test_a_prepared_encoder_alone(accelerator, monkeypatch):
    """Scripts without a decoder prepare the encoder: the wrapper around its forward wraps the fast path."""
    vae, prepared_by = fastvae.accelerate(tiny()), accelerator(mixed_precision="bf16")
    encoder, plain = prepared_by.prepare(vae.encoder), prepared_by.prepare(tiny().encoder)
    torch.testing.assert_close(encoder(pixels()), plain(pixels()))
    prepared_by.unwrap_model(encoder, keep_fp32_wrapper=False)
    walks = Walks(monkeypatch)
    assert_computes_like(vae, tiny())
    assert walks.taken() == ["Encoder", "Decoder"]
    assert_same_bits(fastvae.restore(vae), tiny())
