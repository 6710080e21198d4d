"""Marks a function whose result the compiler may take for a constant, without loading the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(fn: F) -> F:
    """Marks ``fn`` as torch.compiler.assume_constant_result does, which imports torch._dynamo for that: two seconds."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
