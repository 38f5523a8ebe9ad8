"""Which environment, and which actions, a file of demonstrations is about."""

from __future__ import annotations

from dataclasses import dataclass

from cmpolicy_envs.robomimic_args import EnvArgs, input_type, translate
from cmpolicy_envs.robomimic_tasks import TASKS, RobomimicTask

ARM_DIM = 7
"""Numbers per arm of an executed action: position 3, rotation 3 (axis times angle), gripper 1."""
ABSOLUTE_ARM_DIM = 10
"""Of an absolute action: position 3 (m, world), rotation 6 (``matrix_to_rot6d``), gripper 1."""


class RecordedEnvError(ValueError):
    """Demonstrations of an environment that is none of the Robomimic tasks."""


@dataclass(frozen=True)
class RecordedEnv:
    """Where demonstrations come from.

    Attributes:
        task: the Robomimic task.
        env_args: how to build its environment, in robosuite 1.5's terms.
        actions: ``"delta"`` or ``"absolute"``, what the file's actions are.
        in_world: whether the controller's goals are poses in the world frame (else: the base's).
    """

    task: RobomimicTask
    env_args: EnvArgs
    actions: str
    in_world: bool

    @property
    def action_dim(self) -> int:
        """Columns of the file's actions."""
        return ARM_DIM * self.task.n_arms


def recorded_env(text: str, where: str) -> RecordedEnv:
    """Read the JSON ``env_args`` of a file.

    Args:
        text: the JSON. where: the file, for messages.

    Raises:
        EnvArgsError: not readable, another robot or controller than is supported.
        RecordedEnvError: another environment, or another number of robots than its task has.
    """
    args = translate(EnvArgs.from_json(text, where), where)
    tasks = {task.robosuite_env: task for task in TASKS.values()}
    task = tasks.get(args.env_name)
    if task is None:
        known = ", ".join(f"{env} ({task.name})" for env, task in tasks.items())
        raise RecordedEnvError(
            f"{where}: recorded in the environment {args.env_name!r}, which is none of the "
            f"Robomimic tasks. Supported: {known}."
        )
    robots = args.env_kwargs["robots"]
    if len(robots) != task.n_arms:
        raise RecordedEnvError(
            f"{where}: env_kwargs.robots is {robots}; {task.robosuite_env} has {task.n_arms}"
        )
    arm = args.env_kwargs["controller_configs"]["body_parts"]["right"]
    return RecordedEnv(task, args, input_type(args), arm["input_ref_frame"] == "world")
