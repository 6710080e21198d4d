"""The C kernels of fastvae_kernels.cpu as an optional extension: without a compiler the package installs without them.

Everything else about the package is in pyproject.toml.
"""

import runpy

from setuptools import Extension, setup

FOLDER = "kernels/fastvae_kernels/cpu"
SOURCES = runpy.run_path(f"{FOLDER}/sources.py")

setup(
    ext_modules=[
        Extension(
            "fastvae_kernels.cpu.built.kernels",  # no package: Python cannot import it
            [f"{FOLDER}/{name}" for name in SOURCES["NAMES"]],
            depends=[f"{FOLDER}/{name}" for name in (*SOURCES["HEADERS"], "sources.py")],
            extra_compile_args=SOURCES["compile_flags"](),
            extra_link_args=["-fopenmp"],
            optional=True,
            py_limited_api=True,
        )
    ],
    # Read through ctypes, so one build serves every Python.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
