"""Checks the order of imports, the size of folders, the packages' maps, import cost and docstrings."""

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

from bench.pages.import_graph import (
    DATA_ORDER,
    ORDER,
    between_members,
    circle,
    graph,
    imports_back_up,
    imports_of,
    longest_chain,
)

ROOT = Path(__file__).parents[1]
ARCHITECTURE = "docs/architecture.md"
DATA_DEPTH, DATA_ARROWS = 5, 18
LONGEST_CHAIN = 17
MOST_FILES = 16
FOLDERS_WITH_A_MAP = ("fastvae", "bench", "kernels/fastvae_kernels")


def _package_files() -> list[Path]:
    return sorted(p for p in (ROOT / "fastvae").rglob("*.py") if p != ROOT / "fastvae" / "__init__.py")


def test_packages_import_only_what_is_below_them():
    wrong = imports_back_up(between_members(graph(), "fastvae"), ORDER)
    assert not wrong, f"{wrong}: move what both need into the lower package; {ARCHITECTURE} has the order"


def test_sub_packages_of_data_import_only_what_is_below_them():
    data = between_members(graph(), "fastvae.data")
    wrong = imports_back_up(data, DATA_ORDER)
    assert not wrong, f"{wrong}: move what both need into the lower sub-package; {ARCHITECTURE} has the order"
    arrows = sum(map(len, data.values()))
    assert arrows <= DATA_ARROWS, f"{arrows} imports between sub-packages of fastvae.data: take one away"
    depth = len(longest_chain(data))
    assert depth <= DATA_DEPTH, f"{depth} sub-packages of fastvae.data import each other in a row: make one independent"


def test_no_modules_import_each_other_in_a_circle():
    found = circle(graph())
    assert not found, f"{' -> '.join(found)}: move what both need into a module that imports neither"


def test_the_longest_chain_of_files_in_data_does_not_grow():
    data = {a: {b for b in targets if b.startswith("fastvae.data.")} for a, targets in graph().items()}
    chain = longest_chain({module: data[module] for module in data if module.startswith("fastvae.data.")})
    sys.stdout.write(f"{len(chain)} files: {' -> '.join(chain)}\n")
    assert len(chain) <= LONGEST_CHAIN, f"{' -> '.join(chain)}: let one of them take an argument and import less"


def test_diffusers_is_never_imported_by_the_package():
    for path in [*_package_files(), ROOT / "fastvae" / "__init__.py", *(ROOT / "kernels").rglob("*.py")]:
        assert not any(name.split(".")[0] == "diffusers" for name in imports_of(path)), path


def test_kernels_import_torch_and_triton_alone():
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"torch", "triton", "fastvae_kernels", "__future__"}, (path, name)


def test_no_op_imports_an_op():
    """Files of fastvae_kernels itself are the ops: they share what is in parts/ and shared/."""
    below = {"ops": ("parts", "shared"), "parts": ("parts", "shared"), "shared": ("shared",), "cpu": ("cpu", "shared")}
    for module, targets in graph().items():
        top, *rest = module.split(".")
        if top != "fastvae_kernels" or not rest:
            continue
        for target in targets - {"fastvae_kernels"}:
            where = target.split(".")[1]
            kind = rest[0] if rest[0] in below else "ops"
            assert where in below[kind], f"{module} imports {target}: what two ops need belongs into parts/ or shared/"


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _packages() -> list[Path]:
    return sorted({p.parent for top in FOLDERS_WITH_A_MAP for p in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("folder", _packages(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_few_files(folder):
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, (
        f"{folder} has {len(files)} files: make a sub-package of those that belong together"
    )


@pytest.mark.parametrize("folder", _packages(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_docstring_of_a_package_has_one_line_for_each_file(folder):
    named = {path.stem for path in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    named -= {"__init__", "__main__", "_version"}
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    listed = re.findall(r"^(\w+)  +\S", text, re.MULTILINE)
    assert sorted(listed) == sorted(named), f"write one line a file in {folder / '__init__.py'}"


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


PUBLIC = (
    "fastvae",
    "fastvae.models",
    "fastvae.checkpoints",
    "fastvae.training",
    "fastvae.latents.convert",
    "fastvae.latents.scaling",
    "fastvae.latents.sampling",
    "fastvae.tiling",
)


def _public_functions():
    """Every public function of the modules in PUBLIC, and every public method of their classes that is written here."""
    for room in PUBLIC:
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


def test_the_tables_say_what_was_measured():
    """A number in the README's tables comes from a result in the repository."""
    from bench.pages import tables

    text = (ROOT / "README.md").read_text()
    assert tables.SECTION.search(text)
    assert tables.with_results(text) == text, "run: make report"
