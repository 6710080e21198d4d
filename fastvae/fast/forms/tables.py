"""Tables of forms, one file a device: those shipped, then the user's own, which replace them layer by layer.

A table is a JSON object with the device's name and ``entries``; one that `fastvae tune` wrote also has ``made_with``,
the versions it was measured with. It is read once a process. Nothing is measured here, and nothing is written at an
ordinary call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastvae.fast.forms.device_name import name_of
from fastvae.fast.forms.form import Entry, Form, Forms
from fastvae.fast.layer_checks import assume_constant_result
from fastvae.system.atomic_files import write_atomically
from fastvae.system.cache_folder import cache_folder

SHIPPED = Path(__file__).parent / "shipped"
TYPES = {"kind": str, "inputs": int, "outputs": int, "dtype": str, "pixels": int, "form": str}


@assume_constant_result
def forms_of(device: torch.device) -> Forms:
    """Return the forms on a device, by its tables. Raises ValueError if a table cannot be read as one."""
    return _forms_of(name_of(device))


@functools.cache
def _forms_of(name: str) -> Forms:
    shipped, (own, _) = read(SHIPPED / f"{name}.json"), users_entries(name)
    replaced = {entry.layer for entry in own}
    return Forms([*own, *(entry for entry in shipped if entry.layer not in replaced)])


def users_entries(name: str) -> tuple[list[Entry], str | None]:
    """Return the entries of the user's table for the device of this name, and why it cannot be read, or None.

    A home folder that is missing or may not be read stops no call: there is no table then, and doctor names the reason.
    """
    try:
        return read(users_table(name)), None
    except OSError as error:
        return [], str(error)


def users_table(name: str) -> Path:
    """Return the place of the user's table for the device of this name. Raises OSError if there is no home folder."""
    return cache_folder() / "forms" / f"{name}.json"


def write(name: str, entries: Iterable[Entry], made_with: Mapping[str, Any]) -> Path:
    """Write entries into the user's table of the device of this name, and return its path.

    Those of the same layer and size are replaced, others stay. The file appears complete or not at all. Raises OSError
    if the folder cannot be read or written.
    """
    path = users_table(name)
    found = {(entry.layer, entry.pixels): entry for entry in [*read(path), *entries]}
    lines = ",\n".join(json.dumps(dataclasses.asdict(found[place])) for place in sorted(found))
    head = json.dumps({"device": name, "made_with": dict(made_with)}).removesuffix("}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [f'{head}, "entries": [\n{lines}\n]}}\n'.encode()])
    clear()
    return path


def has_table(device: torch.device) -> bool:
    """Return True if a table for this device is shipped, or in the user's cache folder."""
    name = name_of(device)
    return (SHIPPED / f"{name}.json").exists() or bool(users_entries(name)[0])


def why_none(device: torch.device) -> str:
    """Return why a layer has no entry on a device."""
    if has_table(device):
        return f"the table of {name_of(device)} has no entry for it at this size: fastvae tune"
    return f"there is no table for {name_of(device)}: fastvae tune"


def read(path: Path) -> list[Entry]:
    """Return the entries of a table; none if there is no file. Raises ValueError naming the file and the entry."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return [_entry(line) for line in table["entries"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of forms ({error}): delete it, and measure again with fastvae tune"
        ) from error


def _entry(line: Any) -> Entry:
    named = {field.name: line[field.name] for field in dataclasses.fields(Entry)}
    if not all(type(value) is TYPES[name] for name, value in named.items()):
        raise ValueError(f"an entry is {line}")
    return Entry(**{**named, "form": Form(named["form"])})


def clear() -> None:
    """Forget the tables read so far, after a change of their files."""
    _forms_of.cache_clear()
