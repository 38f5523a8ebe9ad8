"""Which store a run trains on: a path, a data set by name, or one of LeRobot's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmpolicy.experiment.config import DataConfig
from cmpolicy.schema import ConfigError
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.catalog import resolve
from cmpolicy_data.convert.lerobot.cached import as_store
from cmpolicy_data.convert.lerobot.hub import find


class Source(NamedTuple):
    """A store, the name of its data set without the machine's own folders, and selectors by key."""

    path: Path
    name: str
    obs: Mapping[str, Any]


def find_source(data: DataConfig) -> Source:
    """The store that the settings name; of a LeRobot data set the converted one.

    Raises:
        ConfigError: none is named. DatasetNotFoundError, LeRobotError: it is not there.
    """
    if data.is_lerobot:
        if data.repo_id is None and data.path is None:
            raise ConfigError(
                "neither data.repo_id nor data.path is set: name the LeRobot data set, such as "
                "data.repo_id=lerobot/pusht, or its folder, data.path=my_data"
            )
        found = find(str(data.repo_id or data.path), data.revision)
        path = as_store(found.root, name=found.name, commit=found.commit)
        keys = [key for key in ReplayBuffer.open(path) if key != data.action]
        return Source(path, found.name, data.obs or dict(zip(keys, keys, strict=True)))
    if data.path is None and data.name == "custom":
        raise ConfigError(
            "data.path is not set: give the store to train on, data.path=my.zarr; its layout is "
            "data/<key> (N, ...) and meta/episode_ends (E,)"
        )
    given = resolve(data.name, data.path)
    named = data.path is None or data.name == "pusht_human"  # else a store of the user's own
    return Source(as_store(given), data.name if named else given.name, data.obs)
