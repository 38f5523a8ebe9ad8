"""``CMPOLICY_PLUGINS=mine,their.package``: modules of a user's own, which commands import first.

What they register (networks, encoders, objectives, augmentations) is then known by its name. From
Python an ordinary import does the same. A policy bundle never names a module to import.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

from cmpolicy.schema import ConfigError

VARIABLE = "CMPOLICY_PLUGINS"


def load_plugins() -> None:
    """Import the modules, from the current folder or installed ones.

    Raises:
        ConfigError: a module is not there, or what it imports is not.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    here = str(Path.cwd())
    if names and here not in sys.path:
        sys.path.append(here)
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"{VARIABLE}={','.join(names)}: {name!r} cannot be imported: {error}; expected "
                f"modules separated by commas, in the current folder ({here}) or installed"
            ) from error
