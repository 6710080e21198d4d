"""The version, in a file of its own: modules that record it import no other."""

__version__ = "0.1.0"
