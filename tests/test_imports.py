"""The house holds: who imports whom, what is light, and that every public name explains itself."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room may import those to its right; rooms in one tuple do not import each other.
ORDER = [
    ("cli",),
    ("report", "scale"),
    ("data", "training"),
    ("fast",),
    ("models",),
    ("latents",),
    ("checkpoints", "tiling", "metrics", "sampling"),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def _imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            # `from fastvae import latents` imports the room latents.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "fastvae" and len(parts) > 1 else None


def _package_files() -> list[Path]:
    return sorted(
        p
        for p in (ROOT / "fastvae").rglob("*.py")
        if p.name not in ("__init__.py", "__main__.py") or p.parent != ROOT / "fastvae"
    )


def test_each_room_imports_only_what_lies_below_it():
    wrong = []
    for path in _package_files():
        room = path.relative_to(ROOT / "fastvae").with_suffix("").parts[0]
        assert room in RANK, f"{path} is in no room of tests/test_imports.py"
        for name in _imports(path):
            target = _room(name)
            assert name.split(".")[0] != "fastvae" or target in RANK or name == "fastvae.__version__", (
                f"{path.relative_to(ROOT)} imports {name}: inside the package, name the room"
            )
            if target in RANK and target != room and RANK[target] <= RANK[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_diffusers_is_never_imported_by_the_package():
    for path in [*_package_files(), ROOT / "fastvae" / "__init__.py", *(ROOT / "kernels").rglob("*.py")]:
        assert not any(name.split(".")[0] == "diffusers" for name in _imports(path)), path


def test_kernels_stand_on_torch_and_triton_alone():
    helpers = {"statistics", "philox", "tiles", "runtime"}
    # The parts of attention.py, which is too long for one file; they are no ops.
    helpers |= {"attention_tiles", "attention_products", "attention_gradient"}
    # Those of group_norm_silu.py and of posterior.py; moments.py serves divergence.py as well.
    helpers |= {"group_norm_tiles", "group_norm_gradient", "moments", "posterior_gradient"}
    for path in (ROOT / "kernels" / "fastvae_kernels").glob("*.py"):
        for name in _imports(path):
            top, *rest = name.split(".")
            assert top in sys.stdlib_module_names | {"torch", "triton", "fastvae_kernels", "__future__"}, (path, name)
            if top == "fastvae_kernels" and path.name != "__init__.py":
                assert rest[0] in helpers, f"{path.name} imports the op {rest[0]}: a composite is an op's own file"


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_map_of_the_largest_room_names_every_file():
    text = importlib.import_module("fastvae.data").__doc__
    files = {path.stem for path in (ROOT / "fastvae" / "data").glob("*.py")} - {"__init__"}
    lines = text.split("\n\n", 1)[1].splitlines()
    listed = re.findall(r"[a-z_]+", " ".join(line.split(": ")[-1] for line in lines))
    assert sorted(listed) == sorted(files)


def test_the_readme_names_every_extra_that_a_user_may_need():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "README.md").read_text()
    assert not [name for name in extras.keys() - {"bench", "dev"} if f"`[{name}]`" not in text]


def test_no_tests_folder_is_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("command", [["-c", "import fastvae"], ["-m", "fastvae", "--help"]], ids=["import", "help"])
def test_the_face_is_light(command):
    """Neither importing the package nor asking the command line for help may load torch or diffusers."""
    probe = (
        "import sys, runpy; sys.path[:0] = ['.', 'kernels']\n"
        + (
            command[1]
            if command[0] == "-c"
            else "sys.argv = ['fastvae', '--help']\n"
            "try: runpy.run_module('fastvae', run_name='__main__')\n"
            "except SystemExit as stop: assert not stop.code, stop.code"
        )
        + "\nassert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_encoding_does_not_load_the_compiler():
    """torch._dynamo takes two seconds, as long as torch itself, and only torch.compile needs it."""
    probe = (
        "import sys; sys.path[:0] = ['.', 'kernels']\nimport torch\nimport fastvae, fastvae.data.encoding.encode\n"
        "vae = fastvae.accelerate(fastvae.AutoencoderKL.from_pretrained('tiny'))\n"
        "with torch.no_grad(): vae.encode(torch.zeros(1, 3, 16, 16))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    # torch loads it for an op of ours: a process that launches no kernel is spared it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


ROOMS = (
    "fastvae",
    "fastvae.models",
    "fastvae.checkpoints",
    "fastvae.training",
    "fastvae.latents.convert",
    "fastvae.latents.sampling",
    "fastvae.tiling",
)


def _public_functions():
    """Every public function of the rooms, and every public method of their classes that is written here."""
    for room in ROOMS:
        module = importlib.import_module(room)
        names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if _is_ours(v, room)]
        for name in names:
            value = getattr(module, name)
            if inspect.isclass(value):
                yield f"{room}.{name}", value
                for method, attribute in inspect.getmembers_static(value):
                    function = attribute.fget if isinstance(attribute, property) else attribute
                    function = inspect.unwrap(getattr(function, "__func__", function))
                    own = inspect.isfunction(function) and function.__module__.startswith("fastvae")
                    if own and not method.startswith("_") and method != "forward":
                        yield f"{room}.{name}.{method}", function
            elif inspect.isfunction(value):
                yield f"{room}.{name}", inspect.unwrap(value)


def _is_ours(value, room):
    return getattr(value, "__module__", None) == room and not getattr(value, "__name__", "_").startswith("_")


def test_every_public_name_explains_itself():
    """A docstring for each; the shape of every tensor it takes or gives; and errors, where some are raised."""
    wrong = []
    for name, value in _public_functions():
        text = inspect.getdoc(value) or ""
        if len(text) < 20:
            wrong.append(f"{name}: no docstring")
        if inspect.isclass(value):
            continue
        # The hints as written: under `from __future__ import annotations` they are text.
        tensors = [hint for hint in value.__annotations__.values() if re.search(r"\bTensor\b", str(hint))]
        if tensors and "[" not in text and "scalar" not in text and "rrors as" not in text:
            wrong.append(f"{name}: takes or gives tensors and states no shape")
        if "raise ValueError" in inspect.getsource(value) and not re.search(r"[Rr]aises|[Ee]rrors", text):
            wrong.append(f"{name}: raises, and does not say so")
    assert not wrong, "\n".join(wrong)


def test_the_walk_over_public_names_sees_methods():
    names = {name for name, _ in _public_functions()}
    expected = {"AutoencoderKL.encode", "AutoencoderKL.from_pretrained", "AutoencoderKL.enable_tiling", "LatentDataset"}
    assert {f"fastvae.{name}" for name in expected} <= names


def test_the_repository_speaks_of_the_product_alone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".safetensors", ".png", ".jpg", ".tar") or not path.exists() or path == Path(__file__):
            continue
        text = path.read_text()
        for word in ("/work/", "/root/", "/tmp/", "TODO", "FIXME"):
            assert word not in text, f"{name} says {word}"


def test_the_tables_say_what_was_measured(monkeypatch):
    """A number in the README's tables comes from a result in the repository."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "README.md").read_text()
    assert tables.SECTION.search(text)
    assert tables.with_results(text) == text, "run: python bench/pages/tables.py"
