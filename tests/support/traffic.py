"""Loads, stores and launches of kernels, counted in Triton's interpreter."""

import contextlib

import numpy as np


@contextlib.contextmanager
def counted():
    """Yield a list; at the end it has, for each launch, the distinct bytes that its programs loaded and stored."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, set_index, call = (
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx, executor.__call__,
    )  # fmt: skip
    launches, touched = [], {"load": [], "store": []}

    def note(kind, pointers, mask):
        addresses = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)]
        touched[kind].append((addresses.ravel(), pointers.get_element_ty().primitive_bitwidth // 8))

    def flush():
        for pieces in touched.values():
            sizes = {size for _, size in pieces}
            for size in sizes:
                launches[-1] += size * len(np.unique(np.concatenate([a for a, s in pieces if s == size])))
            pieces.clear()

    def counting_load(self, pointers, mask, *rest):
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def next_program(self, *index):
        flush()
        return set_index(self, *index)

    def counting_call(self, *args, **kwargs):
        launches.append(0)
        call(self, *args, **kwargs)
        flush()

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    builder.set_grid_idx, executor.__call__ = next_program, counting_call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.set_grid_idx, executor.__call__ = set_index, call


@contextlib.contextmanager
def launches_only():
    """Yield a list that gets the name of each kernel that is launched; no program of it runs."""
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    call, launches = executor.__call__, []

    def note(self, *args, **kwargs):
        launches.append(self.fn.__name__)

    executor.__call__ = note
    try:
        yield launches
    finally:
        executor.__call__ = call
