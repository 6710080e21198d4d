"""Torch's own layers and no interpreter, as on a user's CPU: the interpreter takes seconds a call."""

from data.conftest import _as_a_users_cpu as _as_a_users_cpu
