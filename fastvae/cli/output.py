"""Output of every verb: errors as one sentence with an exit code, and results without control characters.

The exit codes, a run's orderly end on a signal and a stderr that may be closed are promised by docs/errors.md and
docs/reliability.md. click alone ends with 1 for a closed pipe, and a closed terminal would end a run of days.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

from fastvae.cli.signals import graceful_stop
from fastvae.system.terminal import strip_control_characters

OTHER, USAGE, FAILURES, IDENTITY, LOCKED, NO_SPACE, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 5, 6, 75, 141
DEBUG = "FASTVAE_DEBUG"

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Problem(click.ClickException):
    """Foreseen error: one sentence on stderr and an exit code, without a traceback."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(strip_control_characters(message))
        self.exit_code = exit_code  # type: ignore[misc] # click declares it for the class and reads it here

    def show(self, file: Any = None) -> None:
        echo_error(f"fastvae: {self.message}")


def errors_as_sentences(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn the errors that a verb can meet into a Problem; anything else keeps its traceback.

    With --json the Problem is also one JSON document on stdout, {"error": its sentence, "exit_code": its code}.
    FASTVAE_DEBUG=1 in the environment shows a Problem's traceback as well, before its sentence.
    """

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            with graceful_stop(INTERRUPTED):
                return function(*args, **kwargs)
        except KeyboardInterrupt as error:  # of encode and repair with the number of rows that are kept
            counts = f": {error}" if str(error) else ""
            raise Problem(f"interrupted{counts}; run the same command again to go on", INTERRUPTED) from None
        except (ValueError, ImportError, OSError) as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                echo_error(strip_control_characters(traceback.format_exc()).rstrip())
            problem = _problem(error)
            if kwargs.get("as_json"):
                # The sentence on stderr and the exit code say the same where stdout cannot be written.
                with contextlib.suppress(Problem, click.exceptions.Exit):
                    echo_json({"error": problem.message, "exit_code": problem.exit_code})
            raise problem from error
        finally:
            _drop_unwritten(sys.stderr)

    return wrapper


def _problem(error: ValueError | ImportError | OSError) -> Problem:
    from fastvae.data.images.errors import ImageError
    from fastvae.data.store.errors import IdentityMismatch, StoreError, StoreLocked

    if isinstance(error, StoreLocked):
        return Problem(str(error), LOCKED)
    if isinstance(error, IdentityMismatch):
        return Problem(str(error), IDENTITY)
    if isinstance(error, ImageError):
        return Problem(str(error), FAILURES)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(f"no space left: {error}; what was committed stays, free space and run again", NO_SPACE)
    if isinstance(error, ValueError) and not isinstance(error, StoreError):
        return Problem(str(error), USAGE)
    return Problem(str(error), OTHER)


def echo(text: str) -> None:
    """Print a result on stdout. A closed pipe ends the program silently with code 141, as it ends other tools.

    Raises Problem if stdout cannot be written for another reason: the work itself is done.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        _silence(sys.stdout)
        raise click.exceptions.Exit(BROKEN_PIPE) from None
    except OSError as error:
        _silence(sys.stdout)
        raise Problem(f"the work is done, but its report could not be written to stdout: {error}", OTHER) from error


def echo_error(text: str) -> None:
    """Print a line on stderr. Errors of stderr are ignored: the exit code says the same."""
    try:
        click.echo(text, err=True)
    except (OSError, ValueError):
        _silence(sys.stderr)


def echo_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    from fastvae.system.strict_json import strict_json

    echo(strict_json(value))


def _drop_unwritten(stream: Any) -> None:
    """Drop what ``stream`` cannot write, or Python would end with exit code 120 for it."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        _silence(stream)


def _silence(stream: Any) -> None:
    """Send what ``stream`` still holds to the null device, or Python would report the error again at exit."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file of the system: a test's, or none
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def parse_count(text: str) -> int:
    """Parse a count with an optional K, M or G, as in 178M; raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([kKmMgG]?)", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"expected a count such as 178M, got {text!r}")
    return int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2].lower()])


class Count(click.ParamType):
    """A click type for parse_count."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the count; fails with click's usage error."""
        if isinstance(value, int):
            return value
        try:
            return parse_count(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
