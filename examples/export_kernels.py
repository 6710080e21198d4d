"""Write the kernels in the layout of Hugging Face's kernel hub, from which its package ``kernels`` loads them.

    python examples/export_kernels.py dist/

Each backend has a folder under ``build/``: the modules with relative imports, ``_ops.py`` with the namespace of their
ops, ``metadata.json`` with the digest of each file. The namespace ends in a hash of the sources, so that the export can
be loaded beside the installed package and other exports. Layout:
huggingface.co/docs/kernels, "Kernel requirements".
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import fastvae_kernels
from fastvae_kernels.shared.tiles import TARGETS

SOURCES = Path(fastvae_kernels.__file__).parent
NAME = "fastvae-kernels"
MODULE = NAME.replace("-", "_")
# By the hub's convention, version 0 may still change.
VERSION = 0
PUBLIC = {
    "attention": ["spatial_attention", "spatial_attention_shared"],
    "divergence": ["kl_divergence"],
    "group_norm": ["group_norm_affine", "group_norm_statistics", "scale_shift", "scale_shift_silu"],
    "group_norm_silu": ["group_norm", "group_norm_silu"],
    "interleave": ["upsample_interleave"],
    "pixels": ["pixels_conv_in"],
    "posterior": ["sample_posterior"],
    "residual": ["residual_add"],
    "resize": ["Crop", "plan", "resize_lanczos"],
    "upsample": ["four_tap_weights", "upsample_conv"],
    "winograd": ["F2", "F4", "transform_weights", "winograd_conv"],
}
FACE = '''"""Triton kernels for the autoencoder of latent diffusion; channels_last throughout, references on a CPU."""

{imports}

__all__ = {names}
'''
OPS = '''"""Namespace of this build's ops; every build has another."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{NAMESPACE}}::{{op_name}}"
'''
# Old versions of `kernels`, before the flat layout, import this folder as a module without a parent.
OLD_PLACE = '''"""The kernels under the name that older versions of `kernels` look for."""

import importlib.util
import sys
from pathlib import Path

if "{namespace}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{namespace}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{namespace}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{namespace}"])
_face = sys.modules["{namespace}"]
globals().update({{name: getattr(_face, name) for name in _face.__all__}})
__all__ = _face.__all__
'''
CARD = """---
license: apache-2.0
tags: [kernels, triton, vae, diffusers]
---
# {name}

Triton kernels for the autoencoder of latent diffusion (diffusers' AutoencoderKL), as in fastvae. Written by
`examples/export_kernels.py`; they need torch 2.11 and Triton 3.6 or newer. On a CPU each op is its reference in torch.

```python
from pathlib import Path
from kernels import get_local_kernel

ops = get_local_kernel(Path("{name}/build"))
y = ops.group_norm_silu(x, weight, bias, 32, 1e-6)  # x [N, C, H, W] in channels_last; differentiable
```

{rows}
"""


def portable(source: str, depth: int = 0) -> str:
    """Return a module's source with relative imports and its ops in the namespace that ``_ops.py`` names.

    depth: folders between the package and the module. Raises ValueError where a name of the installed package remains.
    """
    dots = "." * (depth + 1)
    source = re.sub(r"^from fastvae_kernels\b\.?", f"from {dots}", source, flags=re.MULTILINE)
    source, libraries = re.subn(r'\bLibrary\("fastvae"', "Library(NAMESPACE", source)
    if libraries:
        source = re.sub(r"^from \.", f"from {dots}_ops import NAMESPACE\nfrom .", source, count=1, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [node.module or ""]
            case ast.Constant(value=str(text)):
                names = re.findall("^fastvae$|fastvae(?=::)", text)
            case _:
                continue
        if any(name.split(".")[0] in ("fastvae", "fastvae_kernels") for name in names):
            raise ValueError(f"line {node.lineno} still names the installed package: {ast.unparse(node)}")
    return source


def sources() -> dict[str, str]:
    """Return every file of the exported package by its path, the tables of tiles included."""
    files = {}
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES)
        files[name.as_posix()] = portable(path.read_text(), len(name.parents) - 1)
    files |= {f"tuned/{path.name}": path.read_text() for path in sorted((SOURCES / "tuned").glob("*.json"))}
    imports = "\n".join(f"from .{module} import {', '.join(names)}" for module, names in PUBLIC.items())
    names = sorted(name for names in PUBLIC.values() for name in names)
    files["__init__.py"] = FACE.format(imports=imports, names=json.dumps(names))
    return files


def backends() -> dict[str, dict[str, object]]:
    """Return the "backend" of each folder's metadata; the architectures are those of the compile audit."""
    cuda = [name.removeprefix("sm_") for name in TARGETS if name.startswith("sm_")]
    return {
        "cuda": {"type": "cuda", "archs": [f"{number[:-1]}.{number[-1]}" for number in cuda]},
        "rocm": {"type": "rocm", "archs": [name for name in TARGETS if name.startswith("gfx")]},
        "cpu": {"type": "cpu"},
    }


def write_variant(folder: Path, backend: str, facts: dict[str, object]) -> None:
    """Write one folder of ``build/``: the package for a backend, and its metadata."""
    files = sources()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    namespace = f"_{MODULE}_{backend}_{digest[:10]}"
    files["_ops.py"] = OPS.format(namespace=namespace)
    files[f"{MODULE}/__init__.py"] = OLD_PLACE.format(namespace=namespace)
    hashes = {}
    for name, text in sorted(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        hashes[name] = base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
    about = {
        "name": NAME,
        "id": namespace,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": facts,
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def export(out: Path) -> Path:
    """Write the repository as ``out``/fastvae-kernels, replacing an earlier export, and return its path.

    Raises ValueError if that folder exists and is no export.
    """
    repository = out / NAME
    if repository.exists() and not list(repository.glob("build/torch-*/metadata.json")):
        raise ValueError(f"{repository} exists and is no export of the kernels: name another folder")
    shutil.rmtree(repository, ignore_errors=True)
    for backend, facts in backends().items():
        write_variant(repository / "build" / f"torch-{backend}", backend, facts)
    rows = "\n".join(f"- `{name}`" for names in PUBLIC.values() for name in names)
    (repository / "README.md").write_text(CARD.format(name=NAME, rows=rows))
    return repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("dist"), help="folder of the repository")
    repository = export(parser.parse_args().out)
    for variant in sorted(repository.glob("build/*")):
        print(variant, json.loads((variant / "metadata.json").read_text())["id"])


if __name__ == "__main__":
    main()
