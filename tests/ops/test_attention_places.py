"""Attention's offsets, and its compiled variants: what no test of values at a size that fits can see."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvae_kernels.parts import attention_gradient, attention_products
from fastvae_kernels.parts.attention_tiles import Round
from fastvae_kernels.shared.runtime import INTERPRETED

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def seen_from(image, renumber=True):
    """Every launch, made for one image, runs as if it were for number ``image`` of a batch that lies before it.

    The programs are numbered on, and each tensor begins as many of its own lengths before the memory it has. So a
    correct offset comes back to that memory, and one that is counted in 32 bits ends elsewhere, which is an
    AssertionError here and not a crash. Without ``renumber`` the launch says itself at which image it begins: the
    programs keep their numbers, and the workspaces, which have one dimension, their place.
    """
    from triton.runtime import errors, interpreter

    builder, convert = interpreter.InterpreterBuilder, interpreter._implicit_cvt
    program_id, load, store = builder.create_get_program_id, builder.create_masked_load, builder.create_masked_store
    memory = []

    def numbered_on(self, axis):
        handle = program_id(self, axis)
        number = handle.data.astype(np.int64) + renumber * image * self.grid_dim[axis]
        assert (number < 2**31).all(), "no GPU numbers so many programs"
        return interpreter.TensorHandle(number.astype(np.int32), handle.dtype)

    def moved_back(value):
        moved = convert(value)
        if isinstance(value, torch.Tensor):
            memory.append((value.data_ptr(), value.data_ptr() + value.nbytes))
            if renumber or value.ndim > 1:
                moved.handle.data = moved.handle.data - np.uint64(image * value.nbytes)
        return moved

    def guarded(access):
        def guard(self, pointers, *rest):
            mask = rest[0] if access is load else rest[1]
            places = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)]
            known = np.zeros(places.shape, bool)
            for first, end in memory:
                known |= (places >= first) & (places < end)
            assert known.all(), "outside of every tensor"
            return access(self, pointers, *rest)

        return guard

    interpreter._implicit_cvt, builder.create_get_program_id = moved_back, numbered_on
    builder.create_masked_load, builder.create_masked_store = guarded(load), guarded(store)
    try:
        yield
    except errors.InterpreterError as error:
        raise AssertionError(str(error)) from error
    finally:
        interpreter._implicit_cvt, builder.create_get_program_id = convert, program_id
        builder.create_masked_load, builder.create_masked_store = load, store


def _inputs():
    # More rows than a tile of 32 has; 2^28 images of so many numbers pass 2^31 by far, and so do their 33 sums each.
    return torch.randn(4, 1, 33, 40).unbind()


# Image 2^28 of a batch, without the memory of those before it.
IMAGE = 2**28
interpreted = pytest.mark.skipif(not INTERPRETED, reason="moves the interpreter's own pointers and programs")


@interpreted
def test_offsets_beyond_32_bits():
    query, key, value, _ = _inputs()
    near = attention_products.attend(query, key, value, 0.2)
    with seen_from(IMAGE):
        far = attention_products.attend(query, key, value, 0.2)
    assert all(map(torch.equal, far, near))


@interpreted
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_gradient_offsets_beyond_32_bits(shared):
    query, key, value, grad = _inputs()
    given = (grad, query, key, None if shared else value, *attention_products.attend(query, key, value, 0.2), 0.2)
    near = attention_gradient.gradients(*given)
    with seen_from(IMAGE):
        far = attention_gradient.gradients(*given)
    assert all(map(torch.equal, far, near))


@interpreted
def test_a_round_that_begins_beyond_32_bits(monkeypatch):
    """Where a round begins is an argument of 32 bits."""
    query, key, value, grad = _inputs()

    class Delta:
        def __getitem__(self, grid):
            return lambda grad, out, delta, *_, **__: delta.copy_((grad * out).sum(dim=2))

    # The one kernel of the gradients that takes no rounds.
    monkeypatch.setattr(attention_gradient, "_delta_kernel", Delta())
    near = attention_products.attend(query, key, value, 0.2)
    near_grads = attention_gradient.gradients(grad, query, key, value, *near, 0.2)
    for module in (attention_products, attention_gradient):
        monkeypatch.setattr(module, "rounds_of", lambda *_, **__: [Round(IMAGE, 1, 0, 33)])
    with seen_from(IMAGE, renumber=False):
        far = attention_products.attend(query, key, value, 0.2)
        far_grads = attention_gradient.gradients(grad, query, key, value, *near, 0.2)
    assert all(map(torch.equal, (*far, *far_grads), (*near, *near_grads)))


VARIANTS = """
import sys
sys.path[:0] = [{bench!r}, {kernels!r}]
import launches, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
from fastvae_kernels import attention
from fastvae_kernels.shared import tiles
seen = {{}}
def take(kernel, *args, grid, warmup, **kwargs):
    launch = launches.describe(kernel, "", args, kwargs)
    seen.setdefault(launch.kernel, set()).add(launch.key)
JITFunction.run, tiles.target_of = take, lambda device: tiles.TARGETS["sm_90"]
with FakeTensorMode(), torch.device("cuda"):
    for index in range(30):
        length = (1 + index) * (30 - index + index % 3) * (1 if index < 20 else 64)
        query = torch.empty(1 + index % 5, length, {channels}, dtype=torch.{dtype})
        for value in (query, None):
            forward = attention.launch_shared if value is None else attention.launch
            out, lse = forward(query, query, *([] if value is None else [value]), 0.1)
            attention.launch_backward(out, query, query, value, out, lse, 0.1)
print(max(len(keys) for keys in seen.values()), *sorted(seen))
"""
KERNELS = {
    "_scores_kernel",
    "_combine_kernel",
    "_product_kernel",
    "_delta_kernel",
    "_weights_kernel",
    "_grad_query_kernel",
    "_grad_keys_kernel",
}


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        (512, "bfloat16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((512, "float32"), (48, "bfloat16"))),
    ],
)
def test_thirty_sizes_compile_at_most_two_variants(channels, dtype):
    """In a process without the interpreter, on fake tensors: what Triton would key its compilations by."""
    folders = {name: str(ROOT / name) for name in ("bench", "kernels")}
    script = VARIANTS.format(**folders, channels=channels, dtype=dtype)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    most, *kernels = done.stdout.split()
    assert set(kernels) == KERNELS
    assert int(most) <= 2
