"""Attention's offsets beyond 32 bits, which no test of values at a size that fits can see."""

import contextlib

import numpy as np
import pytest
import torch
from fastvae_kernels.parts import attention_gradient, attention_products
from fastvae_kernels.parts.attention_tiles import Round
from fastvae_kernels.shared.runtime import INTERPRETED


@contextlib.contextmanager
def seen_from(image, renumber=True):
    """Run each launch for one image as if it were for number ``image`` of a larger batch.

    The numbers of the programs are larger, and each tensor begins as many of its own lengths before its memory. So a
    correct offset is in that memory; an offset counted in 32 bits is elsewhere, which is an AssertionError here and no
    crash. Without ``renumber`` the launch has the number of its first image: the programs keep their numbers, and the
    workspaces, which have one dimension, keep their addresses.
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
    """The first image of a round is an argument of 32 bits."""
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
