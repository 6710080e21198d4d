"""Settings of every test."""

import atexit
import gc
import importlib
import os
import pkgutil
import signal
import tempfile

# A shell starts background processes with SIGINT ignored, and children inherit that: the tests could not interrupt
# theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread a worker, since two workers share two cores. torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU the kernels run in the interpreter. Triton reads it when a kernel is decorated, so it is set before the
# first import of fastvae_kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FASTVAE_INTERPRET_ON_CPU", "1")
# No test uses the network; the tests of Hub addresses use a server on the loopback.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# No test reads or writes the user's tables of forms. Workers inherit the folder, which the first process deletes.
if "FASTVAE_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory()
    os.environ["FASTVAE_CACHE"] = _CACHE.name

import pytest
from support.cpu_limit import pytest_runtest_call  # noqa: F401  (a hook: pytest finds it here)
from support.forks import forks as forks  # a fixture: one server for all folders
from support.longest_first import pytest_collection_modifyitems  # noqa: F401  (a hook too)

# Imports make 690,000 objects that stay. The collector took 5 of the 15 CPU seconds until the first test with them, and
# half a second for each of its full passes after it.
gc.disable()
atexit.register(gc.unfreeze)  # nanobind reports frozen objects as leaks


def _correct_the_interpreter():
    # The interpreter keeps bfloat16 as raw 16-bit integers: tl.dot and arithmetic use those as numbers (results of
    # 1e10), and a cast from fp32 truncates, where a GPU rounds to nearest, ties to even. All in Triton 3.6 and 3.9. 3.6
    # also calls int() on an array of one element, which numpy 2.4 refuses, and rounds a multiply-add twice.
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot, binary_op, convert_float = builder.create_dot, builder.binary_op, interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_wide_dot(self, a, b, d, *rest):
        return create_dot(self, widened(a), widened(b), d, *rest)

    def wide_binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return binary_op(self, left, right, op)
        result = binary_op(self, widened(left), widened(right), op)
        return result if result.dtype.scalar == tl.int1 else self.cast_impl(result, tl.bfloat16)

    def convert_rounding(values, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype, rounding_mode) != (tl.float32, tl.bfloat16, None):
            return convert_float(values, from_dtype, to_dtype, rounding_mode)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))

    def create_fma(self, x, y, z):
        wide = np.multiply(x.data, y.data, dtype=np.float64) + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor, *rest):
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_with_index
    builder.create_dot, builder.binary_op = create_wide_dot, wide_binary_op
    interpreter._convert_float = convert_rounding
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        builder.create_fma = create_fma


def _patch_the_language_once():
    # At each call of a device function the interpreter searches all of triton.language for functions to replace, which
    # the launch has replaced already: 4 ms a call, a third to two thirds of a launch. In Triton 3.6 and 3.9.
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, is_builtin, seen = interpreter._patch_lang, tl.core.is_builtin, {}

    def patch_what_is_not(fn):
        if fn not in seen:
            seen[fn] = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        # Each module is patched separately, their tensor until the launch ends.
        if seen[fn] and not any(is_builtin(lang.load) or is_builtin(lang.tensor.__add__) for lang in seen[fn]):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    interpreter._patch_lang = patch_what_is_not


def _describe_each_type_once():
    # For each value the interpreter formats its type's name and wraps its shape, for each array it lists all types, and
    # for each pair of values it compares shapes by wrapped numbers: half of a launch. In Triton 3.6 and 3.9.
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    core, np_dtype = tl.core, interpreter._get_np_dtype
    begin_block, begin_tensor = core.block_type.__init__, core.tensor.__init__
    broadcast_values = TritonSemantic.broadcast_impl_value
    blocks, shapes, arrays = {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *(side.value if isinstance(side, tl.constexpr) else side for side in shape)
        if key not in blocks:
            begin_block(self, element_ty, shape)
            blocks[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.__dict__.update(blocks[key], element_ty=element_ty)

    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            begin_tensor(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    def broadcast(self, left, right):
        alike = left.type.is_block() and left.shape is right.shape  # ``tensor`` above shares one shape among equal ones
        return (left, right) if alike else broadcast_values(self, left, right)

    def array_dtype(type):
        name = type.scalar.name
        if name not in arrays:
            arrays[name] = np_dtype(type)
        return arrays[name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype = broadcast, array_dtype


if os.environ.get("TRITON_INTERPRET") == "1":
    _correct_the_interpreter()
    _describe_each_type_once()
    _patch_the_language_once()
    # Some tests delete TRITON_INTERPRET. A kernel that one of them imported first would wait for a GPU ever after.
    import fastvae_kernels

    for _, name, _ in pkgutil.walk_packages(fastvae_kernels.__path__, "fastvae_kernels."):
        importlib.import_module(name)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _every_test_alike():
    # Deterministic mode fills torch.empty with NaN, so that an unwritten value is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # By default cuDNN multiplies fp32 in tf32, with errors of 1e-3.
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
