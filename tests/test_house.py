"""The house holds: who imports whom, what is light, and that every public name explains itself."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).parents[1]
# Each room may import those to its right; rooms in one tuple do not import each other.
ORDER = [
    ("cli",),
    ("report", "scale"),
    ("data", "training"),
    ("fast",),
    ("models",),
    ("latents",),
    ("checkpoints", "tiling"),
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
        assert room in RANK, f"{path} is in no room of tests/test_house.py"
        for name in _imports(path):
            target = _room(name)
            if target in RANK and target != room and RANK[target] <= RANK[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_diffusers_is_never_imported_by_the_package():
    for path in [*_package_files(), ROOT / "fastvae" / "__init__.py", *(ROOT / "kernels").rglob("*.py")]:
        assert not any(name.split(".")[0] == "diffusers" for name in _imports(path)), path


def test_kernels_stand_on_torch_and_triton_alone():
    helpers = {"statistics", "philox", "tiles", "runtime"}
    # The parts of attention.py, which is too long for one file; they are no ops.
    helpers |= {"attention_tiles", "attention_long", "attention_gradient"}
    for path in (ROOT / "kernels" / "fastvae_kernels").glob("*.py"):
        for name in _imports(path):
            top, *rest = name.split(".")
            assert top in sys.stdlib_module_names | {"torch", "triton", "fastvae_kernels", "__future__"}, (path, name)
            if top == "fastvae_kernels" and path.name != "__init__.py":
                assert rest[0] in helpers, f"{path.name} imports the op {rest[0]}: a composite is an op's own file"


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


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


def _public_callables():
    for name in fastvae.__all__:
        value = getattr(fastvae, name)
        yield name, value
        if inspect.isclass(value):
            for method, function in vars(value).items():
                own = inspect.unwrap(
                    function.fget if isinstance(function, property) else getattr(function, "__func__", function)
                )
                if not method.startswith("_") and inspect.isfunction(own):
                    yield f"{name}.{method}", own


def test_every_public_name_explains_itself():
    """A docstring for every name of the face and its methods; shapes for tensors, errors where some are raised."""
    wrong = []
    for name, value in _public_callables():
        text = inspect.getdoc(value) or ""
        if not callable(value):
            continue
        if len(text) < 20:
            wrong.append(f"{name}: no docstring")
        source = inspect.getsource(value) if not inspect.isclass(value) else ""
        if "raise ValueError" in source and not ("Raises" in text or "rrors as" in text or "raises" in text):
            wrong.append(f"{name}: raises, and does not say so")
    assert not wrong, "\n".join(wrong)


def test_the_repository_speaks_of_the_product_alone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".safetensors", ".png") or not path.exists() or path == Path(__file__):
            continue
        text = path.read_text()
        for word in ("/work/", "/root/", "/tmp/", "TODO", "FIXME"):
            assert word not in text, f"{name} says {word}"
