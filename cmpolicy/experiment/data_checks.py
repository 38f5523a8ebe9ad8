"""What is said of data before a training, and whether a run that goes on finds its own."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy.experiment.config import DataConfig
from cmpolicy.schema import ConfigError, choose
from cmpolicy.spec import RESERVED
from cmpolicy_data.chunks import printable
from cmpolicy_data.demonstrations import Demonstrations
from cmpolicy_data.frames import channels_first_message, shaped_channels_first
from cmpolicy_data.report import Finding, examine

ACTION = "action"
#: Numbers in one observation step from which on it must be an image or a point cloud.
MAX_STATE_SIZE = 4096
_SHOWN_TASKS = 3


class DataWarning(UserWarning):
    """Data that trains without an error and may give a useless policy."""


def report(arrays: Demonstrations, path: Path, data: DataConfig, tasks: Sequence[str] = ()) -> None:
    """Say what looks healthy in the data that is trained on and is not.

    ``tasks``: what the store says of each of these episodes, if it says that.

    Raises:
        ConfigError: there is something, and ``data.strict``.
    """
    default = data.normalize.get("default", "auto")
    findings = examine(
        {**arrays.numbers, **arrays.targets},
        arrays.episode_ends,
        actions=(ACTION,),
        pauses=arrays.tells_pauses,
        normalize={key: data.normalize.get(key, default) for key in arrays.numbers},
    )
    findings += [*_several_tasks(tasks), *_names_and_shapes(arrays, data)]
    if not findings:
        return
    which = "" if data.episodes is None else " (episodes counted in data.episodes)"
    text = "\n  ".join([f"{path}{which}:", *map(str, findings)])
    if data.strict:
        raise ConfigError(f"{text}\nleave out data.strict to train all the same")
    warnings.warn(text, DataWarning, stacklevel=3)


def _names_and_shapes(arrays: Demonstrations, data: DataConfig) -> Iterator[Finding]:
    """Numbers that look like frames, and keys that a server would not take for observations."""
    for key, values in arrays.numbers.items():
        stored = data.obs.get(key, key)
        said = isinstance(stored, Mapping)  # its kind was thought about
        if key != ACTION and not said and shaped_channels_first(values.shape[1:]):
            yield Finding(key, None, None, None, channels_first_message(key, stored))
    for key in sorted(arrays.obs.keys() & set(RESERVED)):
        yield Finding(
            key,
            None,
            None,
            None,
            "cmpolicy serve knows another meaning of this name, so the policy cannot be served; "
            f"call it otherwise: data.obs={{another_name: {key}}}",
        )


def _several_tasks(tasks: Sequence[str]) -> list[Finding]:
    """Episodes that do several things, of which a policy is not told which one is wanted."""
    counts = Counter(tasks).most_common()
    if len(counts) < 2:
        return []
    shown = ", ".join(f"{printable(text)!r} in {n}" for text, n in counts[:_SHOWN_TASKS])
    rest = ", ..." if len(counts) > _SHOWN_TASKS else ""
    message = (
        f"the episodes do {len(counts)} different things ({shown}{rest}), and the policy is not "
        "told which one is wanted: it learns them all in one, and can only go by what it sees. "
        "data.episodes=[...] takes those of one; the store's attribute tasks has a text for each"
    )
    return [Finding("tasks", None, None, None, message)]


def check_normalize(methods: Mapping[str, str], arrays: Demonstrations) -> None:
    """Refuse ``data.normalize`` of keys that are not there, or that are frames."""
    for key, method in methods.items():
        if key in arrays.images:
            raise ConfigError(
                f"data.normalize.{key}={method}: frames are always scaled from 0..255 to -1..1; "
                "leave it out"
            )
        choose({"default": 0, ACTION: 0, **arrays.obs}, key, "key of data.normalize")


def check_state(key: str, values: npt.NDArray[Any], path: Path) -> None:
    """Refuse numbers that are too many for an observation of the robot's state."""
    shape = values.shape[1:]
    size = int(np.prod(shape))
    if size <= MAX_STATE_SIZE:
        return
    raise ConfigError(
        f"{path}: observation {key!r} has shape {shape} {values.dtype} per step, {size} numbers; a "
        f"state has at most {MAX_STATE_SIZE}. Frames are (H, W, 3) and hold whole numbers in "
        f"[0, 255]; channels first are data.obs.{key}={{key: ..., layout: chw}}. Point clouds are "
        "not supported: leave them out of data.obs, or store features of them"
    )


def check_finite(
    selector: str, values: npt.NDArray[Any], arrays: Demonstrations, path: Path
) -> None:
    """Refuse NaN and infinite numbers in what is trained on."""
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if bad.size:
        episode = int(np.searchsorted(arrays.episode_ends, bad[0], side="right"))
        step = bad[0] - (arrays.episode_ends[episode - 1] if episode else 0)
        raise ConfigError(
            f"{path}: {selector!r} holds NaN or inf at {bad.size} steps, the first is step {step} "
            f"of episode {arrays.source_episode[episode]}; repair or remove them "
            f"(`cmpolicy data validate {path}` lists them)"
        )


def fingerprint(arrays: Demonstrations) -> dict[str, Any]:
    """Shapes of the arrays and a hash of every episode's content, before pauses are left out."""
    named = {**arrays.obs, **arrays.targets, ACTION: arrays.action}
    ends = arrays.episode_ends
    hashes = []
    for start, end in zip(ends - np.diff(ends, prepend=0), ends, strict=True):
        digest = hashlib.blake2b(digest_size=8)
        for key in sorted(named):
            digest.update(np.ascontiguousarray(named[key][start:end]).tobytes())
        hashes.append(digest.hexdigest())
    shapes = {key: [*value.shape[1:], str(value.dtype)] for key, value in sorted(named.items())}
    return {"arrays": shapes, "episodes": hashes}


def check_same_data(
    facts: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path, *, accept: bool = False
) -> bool:
    """Whether a run that goes on finds the data that it was started on.

    Returns:
        Whether it finds the same episodes; False only where ``accept`` lets it go on with others.

    Raises:
        ConfigError: what changed, unless ``accept``, which makes it a warning.
    """
    before, after = facts.get("data", {}), now["data"]
    if not before:
        return True
    noted = "train_episodes" in facts  # the oldest runs did not note which episodes they use
    if _used(facts) == _used(now) if noted else before == after:
        return True
    old, new = before.get("episodes", []), after["episodes"]
    if noted:  # others may be those that data.episodes left out
        old, new = (
            [part["data"]["episodes"][i] for i in sorted({*chain(*_used_ids(part))})]
            for part in (facts, now)
        )
    if before.get("arrays") != after["arrays"]:
        what = f"its arrays were {before.get('arrays')}, they are {after['arrays']}"
    elif len(new) < len(old):
        what = f"it had {len(old)} episodes, it has {len(new)}"
    elif new != old == new[: len(old)]:
        what = f"{len(new) - len(old)} episodes were added to the {len(old)} that it had"
    elif set(new) <= set(before["episodes"]):
        what = "data.episodes or data.weights choose other episodes of it"
    else:
        first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
        what = f"episode {first} of those that are used is another one"
    same = before.get("arrays") == after["arrays"]
    if accept and same:
        warnings.warn(
            f"the run in {run_dir} goes on with other data: {what}. Its scaling stays that of the "
            "data it was started on",
            DataWarning,
            stacklevel=3,
        )
        return bool(old == new)
    how = "go on with this data all the same with data.changed=accept, " if same else ""
    raise ConfigError(
        f"the data is not the one that {run_dir} was started on: {what}. Give the old data with "
        f"data.path=..., {how}or start a new run on this one, from the old policy with init=..."
    )


def told_apart(hashes: Sequence[str]) -> list[tuple[str, int]]:
    """Hashes of episodes, with a number, for an episode may be there twice."""
    seen, told = Counter[str](), []
    for each in hashes:
        seen[each] += 1
        told.append((each, seen[each]))
    return told


def _used(facts: Mapping[str, Any]) -> list[Any]:
    """The arrays, and what the episodes hold that train and that are held out."""
    hashes = facts["data"]["episodes"]
    return [facts["data"]["arrays"], *([hashes[i] for i in ids] for ids in _used_ids(facts))]


def _used_ids(facts: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return facts["train_episodes"], facts["val_episodes"]
