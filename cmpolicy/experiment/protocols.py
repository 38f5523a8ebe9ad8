"""The protocol that a policy is scored under, in the simulator that its demonstrations are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmpolicy.schema import ConfigError
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.robomimic_file import RobomimicFile
from cmpolicy_eval.protocol import PROTOCOL_NAMES, ROBOMIMIC, EvalProtocol, get_protocol


@dataclass(frozen=True)
class Simulator:
    """What a Robomimic store says of its simulator; None where it says nothing.

    Attributes:
        task: such as ``lift``.
        env_args: robomimic's, as JSON: environment, robot, controller.
        actions: ``delta`` or ``absolute``.
    """

    task: str | None = None
    env_args: str | None = None
    actions: str | None = None

    @classmethod
    def from_mapping(cls, facts: Mapping[str, Any]) -> Simulator:
        """From the attributes of a store, or from what :meth:`to_dict` gave.

        A store without ``env_args`` is not Robomimic's, whatever else its attributes are called.
        """
        if facts.get("env_args") is None:
            return cls()
        names = ("task", "env_args", "actions")
        return cls(**{n: None if facts.get(n) is None else str(facts[n]) for n in names})

    def to_dict(self) -> dict[str, str]:
        """What is known, JSON-ready."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def own_protocol(metadata: Mapping[str, Any]) -> str | None:
    """The protocol that a policy's metadata names."""
    name = metadata.get("config", {}).get("task", {}).get("protocol")
    return None if name is None else str(name)


def require_protocol(name: str | None, policy: str) -> str:
    """``name``, or a ConfigError where neither the user nor the policy named one."""
    if name is None:
        raise ConfigError(
            f"{policy} does not say under which protocol to score it; give protocol=<name>, one of "
            f"{', '.join(PROTOCOL_NAMES)}"
        )
    return name


def open_protocol(name: str, task: str | None, simulator: Simulator) -> EvalProtocol:
    """The protocol of that name; for Robomimic tasks with the task, controller and actions.

    Args:
        name: of the protocol.
        task: asked for; None takes the simulator's.
        simulator: of the policy's demonstrations.

    Raises:
        ValueError: unknown names, or a protocol that needs a task and has none.
        ConfigError: the demonstrations are of another task.
    """
    if name not in ROBOMIMIC:
        return get_protocol(name, task=task)
    if task is not None and simulator.task not in (None, task):
        raise ConfigError(
            f"task={task}, but the demonstrations are of {simulator.task!r}; give "
            f"task={simulator.task}, or other data"
        )
    return get_protocol(
        name,
        task=task or simulator.task,
        actions=simulator.actions or "delta",
        env_args=simulator.env_args,
    )


def read_env_args(path: str) -> str:
    """robomimic's ``env_args`` of a data set: its HDF5 file, or a store converted from it.

    Raises:
        ConfigError: the data set says nothing of its environment.
        ValueError, OSError: it cannot be read.
    """
    file = Path(path).expanduser()
    if file.suffix in (".hdf5", ".h5"):
        with RobomimicFile.open(file) as demonstrations:
            return demonstrations.env_args
    env_args = Simulator.from_mapping(ReplayBuffer.open(file).attrs).env_args
    if env_args is None:
        raise ConfigError(
            f"env_args={path}: this store does not say which environment it was recorded in; give "
            "the HDF5 file, or a store made from it by `cmpolicy data convert robomimic`"
        )
    return env_args
