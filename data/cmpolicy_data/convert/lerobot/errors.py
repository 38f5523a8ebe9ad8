"""What can go wrong with a LeRobot data set, and the packages that read it."""

from __future__ import annotations

from types import ModuleType


class LeRobotError(ValueError):
    """A LeRobot data set that cannot be read, written or found; says what to do."""


def import_av() -> ModuleType:
    """The package av (PyAV).

    Raises:
        ImportError: not there, or not usable; names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise _not_imported("av (PyAV)", error) from error
    return av


def import_parquet() -> ModuleType:
    """The module pyarrow.parquet.

    Raises:
        ImportError: not there, or not usable; names the extra.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:  # also a release that needs another numpy
        raise _not_imported("pyarrow", error) from error
    return pyarrow.parquet


def _not_imported(name: str, error: ImportError) -> ImportError:
    return ImportError(
        f"LeRobot data sets need {name}, which cannot be imported ({error}); install it with: "
        "pip install 'cmpolicy[lerobot]'"
    )
