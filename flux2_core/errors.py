"""The exceptions that reach a person, and the exit codes that scripts see.

    CacheloomError        1  something we did not foresee
    +-- UsageError        2  wrong usage or configuration
    +-- DataError         3  data or cache refused
    +-- SetupError        4  the environment lacks something (GPU, storage right, model access)

Every message says what was given, what is allowed and what to do.
"""

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class CacheloomError(Exception):
    """Base of our errors."""

    exit_code = 1


class UsageError(CacheloomError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class DataError(CacheloomError):
    """The pictures, captions or the cache are refused."""

    exit_code = 3


class SetupError(CacheloomError):
    """The machine, the cluster, the storage or the model is not reachable as it must be."""

    exit_code = 4


def choose(table: Mapping[str, Entry], key: str, *, setting: str) -> Entry:
    """The entry of a table of choices: each option has one such table, in its room.

    Raises:
        UsageError: the table has no such entry; names those that it has.
    """
    if key not in table:
        raise UsageError(f"{setting}={key!r}: there is no such choice; take one of {', '.join(table)}")
    return table[key]
