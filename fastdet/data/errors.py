"""What goes wrong with files of data."""

from __future__ import annotations


class DataError(ValueError):
    """A file of data is missing, cannot be read or says something impossible; the message is one line naming it."""
