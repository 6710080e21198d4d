"""Benchmarks and checks of the kernels, from the repository's root: `python -m bench.kernels.audit`.

timing   measurements beside eager torch and diffusers, through a gate of accuracy
kernels  compile audit, mutations and the search of tiles
store    rates of reading, and whole runs over photographs
memory   peak memory and time of exact tiling, in child processes
pages    tables and pictures of the results, for README and docs
"""
