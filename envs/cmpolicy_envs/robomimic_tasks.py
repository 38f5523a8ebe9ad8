"""The Robomimic tasks: their names here, in robosuite and in Gymnasium."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class RobomimicTask:
    """One task of the Robomimic benchmark (2108.03298)."""

    name: str
    """Name in settings and file names."""
    robosuite_env: str
    gym_id: str
    max_steps: int
    """Length of an episode at 20 Hz in Diffusion Policy's evaluation (2303.04137)."""
    n_arms: int
    model_varies: bool
    """Whether robosuite draws sizes of objects at each reset, and not only their places."""
    object_size: int
    """Numbers of the observation ``object``."""
    quats_to_hand: tuple[int, ...] = ()
    """Where in ``object`` quaternions of objects in the gripper's frame begin."""


def _gym_id(name: str) -> str:
    return f"cmpolicy/Robomimic-{name}-v0"


TASKS: dict[str, RobomimicTask] = {
    task.name: task
    for task in (
        RobomimicTask("lift", "Lift", _gym_id("Lift"), 400, 1, True, 10),
        RobomimicTask("can", "PickPlaceCan", _gym_id("Can"), 400, 1, False, 14, (3,)),
        RobomimicTask("square", "NutAssemblySquare", _gym_id("Square"), 400, 1, False, 14, (3,)),
        RobomimicTask("transport", "TwoArmTransport", _gym_id("Transport"), 700, 2, True, 41),
        RobomimicTask("tool_hang", "ToolHang", _gym_id("ToolHang"), 700, 1, False, 44, (3, 17, 31)),
    )
}


def get_task(name: str) -> RobomimicTask:
    """Task by its name; ValueError lists the known ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(str(name).lower(), TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown Robomimic task {name!r}; known: {', '.join(TASKS)}{hint}")
    return TASKS[name]


def task_of(robosuite_env: str) -> RobomimicTask:
    """Task by robosuite's name of its environment; ValueError lists the known ones."""
    for task in TASKS.values():
        if task.robosuite_env == robosuite_env:
            return task
    known = ", ".join(task.robosuite_env for task in TASKS.values())
    raise ValueError(f"{robosuite_env!r} is no task of Robomimic; known: {known}")
