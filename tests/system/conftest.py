"""Fixtures of the tests of fastvae.system."""

from support.forks import forks as forks  # the fixture
