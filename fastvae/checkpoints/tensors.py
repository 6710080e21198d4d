"""Reading tensors from checkpoint files: only those that the model needs, each checked, converted and placed."""

from __future__ import annotations

import functools
import pickle
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from fastvae.checkpoints import names
from fastvae.checkpoints.files import PICKLE_SUFFIXES, WeightFiles, check_pickle, commit_of
from fastvae.checkpoints.report import LoadReport
from fastvae.system.safetensors_header import WEIGHTS_HEADER, check_header
from fastvae.system.terminal import first_few

Shapes = Mapping[str, tuple[int, ...]]

# Errors of torch's weights-only unpickler for bytes that are not a pickle.
_NOT_A_PICKLE = (RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError, TypeError, struct.error)


class Checkpoint:
    """Tensors of one checkpoint, by their names in the files. A shard is downloaded when one of its tensors is read."""

    def __init__(self, weights: WeightFiles, allow_pickle: bool = False) -> None:
        self._weights = weights
        self._pickled: dict[str, Tensor] | None = None
        self.opened: list[Path] = []
        if weights.single is None:
            self.names = tuple(weights.weight_map or ())
        elif weights.single.suffix in PICKLE_SUFFIXES:
            check_pickle(weights.single, allow_pickle)
            self._pickled = _read_pickle(weights.single)
            self.opened.append(weights.single)
            self.names = tuple(self._pickled)
        else:
            with _opened(weights.single) as file:
                self.names = tuple(file.keys())

    @property
    def source(self) -> str:
        """File or index to name in messages."""
        return str(self._weights.single or self._weights.index)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, from the headers alone."""
        if self._pickled is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        found = {}
        for path, inside in self._by_file(self.names):
            with _opened(path) as file:
                found.update((name, tuple(_slice(file, name, path).get_shape())) for name in inside)
        return found

    def read(self, tensor_names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor), file by file. A tensor may be a view of the mapped file: copy those that are kept."""
        if self._pickled is not None:
            for name in tensor_names:
                yield name, self._pickled[name]
            return
        for path, inside in self._by_file(tensor_names):
            self.opened.append(path)
            with _opened(path) as file:
                for name in inside:
                    _slice(file, name, path)
                    yield name, file.get_tensor(name)

    def _by_file(self, tensor_names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
        if self._weights.single is not None:
            yield self._weights.single, list(tensor_names)
            return
        groups: dict[str, list[str]] = {}
        for name in tensor_names:
            groups.setdefault((self._weights.weight_map or {})[name], []).append(name)
        for shard, inside in groups.items():
            yield self._weights.shard(shard), inside


def read_tensors(
    checkpoint: Checkpoint,
    expected: Shapes,
    report: LoadReport,
    dtype: torch.dtype | None,
    device: torch.device,
    strict: bool = True,
) -> dict[str, Tensor]:
    """Read the tensors ``expected`` (diffusers' name -> shape) to ``device``, and fill in ``report``.

    Only tensors of ``report.parts`` are read. ``dtype`` None keeps that of the file, or the widest of several, or
    float32 for float8; integers are never converted.
    Every tensor is a copy, so that replacing the file later changes nothing. Raises ValueError for missing tensors,
    tensors of a wrong shape or of integers, and tensors of the VAE that the model does not have; if ``strict``, for
    tensors outside the VAE too.
    """
    table = names.rename_table(checkpoint.names)
    needed = {name: shape for name, shape in expected.items() if names.part_of(name, report.parts)}
    old_names = {new: old for old, new in table.items()}
    _record_unread(checkpoint, table, expected, needed, report, strict)
    absent = [name for name in needed if name not in old_names]
    # Counter of training steps, absent from converted FLUX.2 files; no result depends on it.
    counters = [name for name in absent if name.endswith(".num_batches_tracked")]
    missing = [name for name in absent if name not in counters]
    if missing:
        raise ValueError(
            f"{checkpoint.source}: {len(missing)} of {len(needed)} tensors are missing: {first_few(missing)}"
        )
    tensors = {name: torch.zeros((), dtype=torch.int64, device=device) for name in counters}
    found_dtypes: Counter[str] = Counter()
    reshaped = []
    for old, tensor in checkpoint.read([old_names[name] for name in needed if name in old_names]):
        new = table[old]
        shaped = _shaped(tensor, new, needed[new])
        if shaped is None:
            got, taken = list(tensor.shape), list(needed[new])
            raise ValueError(f"{checkpoint.source}: {old} has shape {got}, expected {taken} for {new}")
        # The counter of training steps is the only integer of a model.
        if not tensor.is_floating_point() and not new.endswith(".num_batches_tracked"):
            raise ValueError(f"{checkpoint.source}: {old} is {_short(tensor.dtype)}; floating-point numbers are taken")
        reshaped += [new] if shaped.shape != tensor.shape else []
        found_dtypes[_short(tensor.dtype)] += 1
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensors[new] = shaped.to(device=device, dtype=target, copy=True).contiguous()
    if dtype is None:
        _unite_dtypes(tensors, report)
    report.files = tuple(str(path) for path in dict.fromkeys(checkpoint.opened))
    report.commit = next(filter(None, map(commit_of, checkpoint.opened)), None)
    report.loaded = tuple(sorted(set(tensors) - set(counters)))
    report.renamed = {old_names[name]: name for name in report.loaded if old_names[name] != name}
    report.reshaped = tuple(reshaped)
    report.dtypes = dict(found_dtypes)
    return tensors


def _unite_dtypes(tensors: dict[str, Tensor], report: LoadReport) -> None:
    """Convert weights of several dtypes, in place, to the one that holds the values of all, and record it.

    torch computes with one dtype, and with none of one byte: of float8 alone the weights become float32. The statistics
    of a batch norm keep theirs: they are converted where they are used.
    """
    weights = {
        name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not name.startswith("bn.")
    }
    found = sorted({tensor.dtype for tensor in weights.values()}, key=str)
    # torch promotes no floats of one byte; each wider dtype holds their values.
    dtype = functools.reduce(torch.promote_types, [one for one in found if one.itemsize > 1] or [torch.float32])
    if found in ([], [dtype]):
        return
    tensors.update((name, tensor.to(dtype)) for name, tensor in weights.items())
    report.dtype = _short(dtype)
    report.notes += (f"the weights in the file are {' and '.join(map(_short, found))}: all are {report.dtype} now",)


def convertible_dtype(
    torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """Return the dtype to convert to: None means float32, as in diffusers; "auto", returned as None, that of the file.

    Of float8 "auto" is float32: torch computes with no dtype of one byte. ``dtype`` is the newer name of
    the argument. Raises ValueError if both are given and differ, and for what is no floating-point torch.dtype.
    """
    if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
        raise ValueError(f"torch_dtype and dtype are one argument, got {torch_dtype} and {dtype}: give one of them")
    dtype = torch_dtype if dtype is None else dtype
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str) and dtype == "auto":
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f'torch_dtype must be a floating-point torch.dtype, "auto" or None, got {dtype!r}')
    return dtype


def check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Return ``parts`` as a tuple in a fixed order. Raises ValueError unless they are "encoder", "decoder" or both."""
    given = (parts,) if isinstance(parts, str) else tuple(parts)
    if not given or not set(given) <= set(names.PART_ROOTS):
        raise ValueError(f'parts must name "encoder", "decoder" or both, got {parts!r}')
    return tuple(part for part in names.PART_ROOTS if part in given)


def _record_unread(
    checkpoint: Checkpoint,
    table: Mapping[str, str],
    expected: Shapes,
    needed: Shapes,
    report: LoadReport,
    strict: bool,
) -> None:
    """Record the tensors that are not read. Raises ValueError for tensors of the VAE that the model does not have."""
    unknown, dropped, not_read = [], [], []
    for old in checkpoint.names:
        new = table.get(old)
        if new in needed:
            continue
        if new in expected or (new is not None and not names.part_of(new, report.parts)):
            not_read.append(old)
        elif new is not None and _is_fused_copy(new, table):
            dropped.append(old)
        elif strict or new is not None:
            unknown.append(old)
        else:
            dropped.append(old)
    if not table:
        raise ValueError(f"{checkpoint.source}: holds no VAE: {first_few(checkpoint.names) or 'it has no tensors'}")
    if unknown:
        raise ValueError(f"{checkpoint.source}: {len(unknown)} tensors are unknown to the model: {first_few(unknown)}")
    report.dropped, report.not_read = tuple(dropped), tuple(not_read)


def _is_fused_copy(name: str, table: Mapping[str, str]) -> bool:
    # After fuse_qkv_projections diffusers saves to_qkv as well as to_q, to_k, to_v, and ignores it on load.
    return ".to_qkv." in name and name.replace(".to_qkv.", ".to_q.") in table.values()


def _shaped(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor | None:
    if tuple(tensor.shape) == shape:
        return tensor
    ones = tuple(tensor.shape[2:])
    is_convolution = names.is_attention_weight(name) and set(ones) == {1} and tuple(tensor.shape[:2]) == shape
    return tensor.reshape(shape) if is_convolution else None


def _slice(file, name: str, path: Path):
    try:
        return file.get_slice(name)
    except safetensors.SafetensorError:
        raise ValueError(f"{path}: the index says that {name} is here, and it is not") from None


@contextmanager
def _opened(path: Path):
    try:
        check_header(path, WEIGHTS_HEADER)
        file = safetensors.safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({path.stat().st_size} bytes; {error})") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error})") from None
    with file as handle:
        yield handle


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds something other than weights, and none of it was run") from None
    except _NOT_A_PICKLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable pickle of weights ({reason})") from None
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a dictionary of tensors is taken, got {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
