"""The exported kernels: the hub's layout, no need of the installed package, and the same results beside it."""

import ast
import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import fastvae_kernels
import pytest
import torch
from fastvae_kernels import attention, group_norm_silu, posterior, residual, upsample
from fastvae_kernels.shared.runtime import KERNEL_DEVICES

ROOT = Path(__file__).parents[2]
BACKEND = "cuda" if torch.cuda.is_available() else "cpu"


def load(name, path):
    """Return a file as a module of that name, as the hub's loader imports it."""
    specification = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


exporter = load("export_kernels", ROOT / "examples" / "export_kernels.py")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return exporter.export(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def variant(repository):
    return repository / "build" / f"torch-{BACKEND}"


@pytest.fixture(scope="module")
def namespace(variant):
    return json.loads((variant / "metadata.json").read_text())["id"]


@pytest.fixture(scope="module")
def exported(variant, namespace):
    return load(namespace, variant / "__init__.py")


def image(seed, channels=8, side=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, side, side, generator=generator, device="cpu").to(BACKEND)
    return x.contiguous(memory_format=torch.channels_last)


def vector(seed, channels=8):
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed)).to(BACKEND)


def tokens(seed):
    return torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)).to(BACKEND)


# Ops with their arguments: one of each kind, several with a gradient.
CALLS = {
    "group_norm_silu": (group_norm_silu, lambda: (image(0), vector(1), vector(2), 4, 1e-6)),
    "residual_add": (residual, lambda: (image(0), image(1), vector(2))),
    "spatial_attention": (attention, lambda: (tokens(0), tokens(1), tokens(2), 0.25)),
    "sample_posterior": (posterior, lambda: (image(0), torch.tensor([7, 8], dtype=torch.int64, device=BACKEND))),
    "upsample_conv": (upsample, lambda: (image(0), image(1).repeat(4, 1, 1, 1)[..., :3, :3].contiguous(), vector(2))),
}


def computed(function, arguments):
    """Return the results of a call, and the gradients of their sum of squares."""
    arguments = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    results = function(*arguments)
    results = results if isinstance(results, (tuple, list)) else (results,)
    sum((result**2).sum() for result in results if result.requires_grad).backward()
    return [*results, *(a.grad for a in arguments if torch.is_tensor(a) and a.requires_grad)]


@pytest.mark.parametrize("name", CALLS)
def test_both_packages_in_one_process_give_the_same_bits(exported, name):
    module, arguments = CALLS[name]
    installed, other = getattr(module, name), getattr(exported, name)
    assert other is not installed
    expected, given = computed(installed, arguments()), computed(other, arguments())
    assert len(expected) == len(given) > 1
    for one, two in zip(expected, given, strict=True):
        assert torch.equal(one, two), name


def test_every_op_of_the_installed_package_has_a_twin_in_a_namespace_of_its_own(exported, namespace):
    for path in exporter.SOURCES.rglob("*.py"):
        name = ".".join(path.relative_to(exporter.SOURCES.parent).with_suffix("").parts)
        importlib.import_module(name.removesuffix(".__init__"))
    exports = {name for names in exporter.PUBLIC.values() for name in names}
    assert set(exported.__all__) == exports
    installed = {name.removeprefix("fastvae::") for name in _ops_of("fastvae")}
    assert installed == {name.removeprefix(f"{namespace}::") for name in _ops_of(namespace)}
    # An op that is not exported by name is the backward of one that is.
    hidden = {name for name in installed - exports if not name.endswith("_backward")}
    assert hidden == {"group_norm_forward"}


def _ops_of(namespace):
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name for schema in schemas if schema.name.startswith(f"{namespace}::")}


def test_the_ops_have_their_kernels_fakes_and_gradients(exported, namespace):
    for name in _ops_of(namespace):
        for key in ("Meta", *({"cuda": "CUDA", "cpu": "CPU"}[device] for device in KERNEL_DEVICES)):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
    op = getattr(torch.ops, namespace).residual_add.default
    torch.library.opcheck(op, (image(0), image(1), vector(2)))
    compiled = torch.compile(exported.residual_add, backend="eager", fullgraph=True)
    assert torch.equal(compiled(image(0), image(1))[0], exported.residual_add(image(0), image(1))[0])


def test_it_needs_neither_fastvae_nor_its_kernels(variant, namespace):
    """In a process that refuses both, through the folder of older loaders, which loads the package itself."""
    probe = f"""
import importlib.util, sys
import torch
for name in ("fastvae", "fastvae_kernels"):
    sys.modules[name] = None
path = {str(variant)!r} + "/fastvae_kernels/__init__.py"
specification = importlib.util.spec_from_file_location("as_older_versions_do", path)
sys.modules["as_older_versions_do"] = old = importlib.util.module_from_spec(specification)
specification.loader.exec_module(old)
for module in (old, sys.modules["{namespace}"]):
    x = torch.ones(1, 8, 2, 2).to(memory_format=torch.channels_last)
    print(module.group_norm_silu(x, torch.ones(8), torch.full((8,), 3.0), 4, 1e-6).unique())
"""
    command = [sys.executable, "-I", "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["tensor([2.8577])"] * 2  # silu(3): a constant image normalises to 0


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm"])
def test_the_layout_is_the_hubs(repository, backend):
    folder = repository / "build" / f"torch-{backend}"
    about = json.loads((folder / "metadata.json").read_text())
    assert about["name"].replace("-", "_") == fastvae_kernels.__name__
    assert about["id"].isidentifier()
    assert about["backend"]["type"] == backend
    assert about["license"] == "Apache-2.0"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if "__pycache__" not in name}
    hashes = {name: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for name, p in files.items()}
    hashes.pop("metadata.json")
    assert about["digest"] == {"algorithm": "sha256", "files": hashes}
    for name in files:
        if name.endswith(".py"):
            _imports_nothing_else(files[name])


def _imports_nothing_else(path):
    for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names | {"torch", "triton"}, (path, name)


def test_the_namespace_follows_the_sources(tmp_path, namespace, monkeypatch):
    same = exporter.export(tmp_path / "same")
    written = exporter.sources()
    changed = written | {"shared/tiles.py": written["shared/tiles.py"] + "\n# other\n"}
    monkeypatch.setattr(exporter, "sources", lambda: changed)
    other = exporter.export(tmp_path / "other")
    names = [json.loads((r / "build" / f"torch-{BACKEND}" / "metadata.json").read_text())["id"] for r in (same, other)]
    assert names[0] == namespace != names[1]


def test_imports_are_relative_to_the_folder_of_a_module():
    source = "from fastvae_kernels import statistics\nfrom fastvae_kernels.shared.runtime import tl\n"
    assert exporter.portable(source) == "from . import statistics\nfrom .shared.runtime import tl\n"
    assert exporter.portable(source, 1) == "from .. import statistics\nfrom ..shared.runtime import tl\n"


REFUSED = {
    "a plain import": "import fastvae_kernels.shared.tiles",
    "an op by its full name": 'x = torch.ops["fastvae::residual_add"]',
    "an import inside": "if x:\n    from fastvae_kernels import y",
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_a_source_that_would_name_the_installed_package_is_refused(source):
    with pytest.raises(ValueError, match="still names the installed package"):
        exporter.portable(source)


def test_a_folder_that_is_no_export_stays(tmp_path):
    (tmp_path / exporter.NAME).mkdir()
    (tmp_path / exporter.NAME / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"is no export of the kernels"):
        exporter.export(tmp_path)
    assert (tmp_path / exporter.NAME / "mine").read_text() == "mine"


def test_the_hubs_own_package_loads_it(repository, variant):
    kernels = pytest.importorskip("kernels._rust", reason="Hugging Face's kernels is not there: make test-integrations")
    from kernels import get_local_kernel

    for folder in repository.glob("build/*"):
        metadata = kernels.Metadata.read_from_file(folder / "metadata.json")
        metadata.digest.validate(kernels.Digest.hash_variant(kernels.DigestAlgorithm.SHA256, folder))
    loaded = get_local_kernel(repository / "build", backend=BACKEND)
    assert Path(loaded.__file__).parent == variant
    module, arguments = CALLS["group_norm_silu"]
    assert torch.equal(loaded.group_norm_silu(*arguments()), module.group_norm_silu(*arguments()))
