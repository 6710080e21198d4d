"""docs/swap-in.md lists every reason, pipeline and preset, and the models that accelerate refuses."""

import ast
import inspect
import re
from pathlib import Path

import diffusers
import diffusers.models.autoencoders
import pytest
import torch
from support.small_store import small_vae
from swap_in import tiny_pipelines

import fastvae
from fastvae.checkpoints.presets import PRESETS
from fastvae.fast import fallback_reasons
from fastvae.fast.fallback_reasons import Reason

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "swap-in.md").read_text()
INITIALISER = re.compile(r"\bdef __init__\(([^)]*?\bvae: .*?)\)(?: -> None)?:\n", re.DOTALL)
OF_THIS_SHAPE = re.compile(r"\b(AutoencoderKL|AutoencoderKLFlux2|AsymmetricAutoencoderKL)\b")


def table(heading):
    """Return the rows of the table whose head starts with ``heading``, each a list of its cells."""
    lines = PAGE[PAGE.index(f"| {heading}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(cell):
    return set(re.findall(r"`([^`]+)`", cell))


def test_every_reason_is_explained():
    assert [cells[0].strip("`") for cells in table("reason")] == [reason.name for reason in Reason]


def pipelines():
    """Return the folders of diffusers.pipelines with a class whose ``vae`` is annotated as one of this shape."""
    root, found = Path(diffusers.__file__).parent / "pipelines", set()
    for path in root.rglob("*.py"):
        # Signatures only: to parse whole files takes five seconds.
        for signature in INITIALISER.findall(path.read_text()):
            arguments = ast.parse(f"def __init__({signature}): ...").body[0].args
            hints = [each.annotation for each in (*arguments.args, *arguments.kwonlyargs) if each.arg == "vae"]
            if any(hint is not None and OF_THIS_SHAPE.search(ast.unparse(hint)) for hint in hints):
                found.add(path.parent.relative_to(root).name)
    return found


def test_every_pipeline_has_a_row_and_every_row_a_pipeline():
    listed = set().union(*(names(cells[1]) for cells in table("VAE (preset)")))
    assert listed == pipelines()


def test_pipelines_marked_as_run_have_a_case():
    """Each marked folder has a case, and each case is in a marked folder."""
    marked = set().union(*(names(cells[1]) for cells in table("VAE (preset)") if cells[2]))
    built = [tiny_pipelines.build(case) for case in tiny_pipelines.CASES]
    assert marked == {type(pipe).__module__.split(".")[2] for pipe in built}


def test_every_preset_is_named_and_those_from_memory_are_marked():
    cells = " ".join(cells[0] for cells in table("VAE (preset)"))
    marked = {name: mark == "°" for name, mark in re.findall(r"`([^`]+)`(°?)", cells)}
    assert marked == {name: not preset.verified for name, preset in PRESETS.items()}


def autoencoders():
    """Yield every model in diffusers' folder of autoencoders that can be built without arguments."""
    for name, kind in vars(diffusers.models.autoencoders).items():
        if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin):
            taken = list(inspect.signature(kind.__init__).parameters.values())[1:]
            if not any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in taken):
                yield name, kind


FAST = {"AutoencoderKL", "AutoencoderKLFlux2", "VQModel"}
FAST_ENCODER = {"AsymmetricAutoencoderKL", "AutoencoderKLTemporalDecoder", "ConsistencyDecoderVAE"}
TAKEN = {"AutoencoderKLHunyuanVideo", "AutoencoderKLMagvit"}


REFUSED = {"AutoencoderTiny", "AutoencoderDC", "AutoencoderKLWan"}


@pytest.mark.parametrize(
    "names_run",
    [
        pytest.param(FAST | FAST_ENCODER | TAKEN | REFUSED, id="one of each"),
        pytest.param(None, id="every one", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # from vocoders
def test_every_other_autoencoder_is_refused(names_run):
    seen = dict(autoencoders())
    assert set(seen) >= FAST | FAST_ENCODER | TAKEN | REFUSED
    for name, kind in seen.items():
        if names_run is not None and name not in names_run:
            continue
        with torch.device("meta"):
            model = kind()
        if name in FAST | FAST_ENCODER | TAKEN:
            assert f"`{name}`" in PAGE
            fastvae.accelerate(model)
            parts = [getattr(model, part) for part in ("encoder", "decoder") if hasattr(model, part)]
            fast = [fallback_reasons.why_not_shape(part) is None for part in parts]
            assert fast[0] is (name not in TAKEN)
            assert fast[1:] in ([name in FAST], [])
        else:
            with pytest.raises(TypeError, match=r"a VAE with an encoder|is built like AutoencoderKL"):
                fastvae.accelerate(model)


def test_a_gradient_of_a_gradient_is_refused(monkeypatch):
    vae = fastvae.accelerate(small_vae().requires_grad_(True))
    x = torch.rand(1, 3, 8, 8, requires_grad=True)

    def twice():
        (gradient,) = torch.autograd.grad(vae.encoder(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="backward"):
        twice()
    fastvae.restore(vae)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attention)
    twice()
    assert x.grad.isfinite().all()


def _attention(query, key, value, **options):
    """Compute attention by plain operators: torch's own has no second derivative on a CPU."""
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value
