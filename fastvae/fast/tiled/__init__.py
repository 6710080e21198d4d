"""Exact tiling: encode and decode in bands of rows, within a memory budget, with the bits of the whole image.

budget        the argument max_memory: bytes, "12GiB" or "auto"
steps         the steps of a part with their sizes
operators     convolutions and norms of bands on a CPU
bands         rows that flow through layers, each of which keeps the few that it needs again
chain         the layers between two stored activations
planner       what is stored and what is computed again, for a budget
run           a plan, carried out
exact_tiling  the setting of an accelerated model, and calls under it
switches      enable_tiling and disable_tiling of an accelerated model
"""
