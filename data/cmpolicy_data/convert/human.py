"""Human demonstrations as robosuite's own `collect_human_demonstrations` stores them, from 1.0 on.

Such a file has states and actions but no observations, and its scene is that of an older robosuite,
which 1.5 cannot load. What carries over is the state: joint by joint, by name, into the scene of
robosuite 1.5, which then gives the observations. That the two scenes agree where it matters is
checked: some recorded state must count as success in robosuite 1.5 too.

The physics of robosuite 1.5 is not that of the recording either, so actions that are played without
looking may drift away from it; `cmpolicy data replay robomimic` says whether they still succeed.
"""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.convert.goals import Recording, absolute_actions, goal_reader
from cmpolicy_data.convert.recorded_env import RecordedEnv, RecordedEnvError, recorded_env
from cmpolicy_data.convert.robomimic import ACTIONS, ConversionReport
from cmpolicy_data.convert.writing import ConvertedEpisode, check_target, write_store
from cmpolicy_data.robomimic_file import Demo, RobomimicFile, RobomimicFileError, text_of

CONVERTER = "cmpolicy_data.convert.human"
VERSION = 1
_CONTROL_FREQ = 20  # robosuite's, where the file does not say
_SIZES = {"hinge": (1, 1), "slide": (1, 1), "ball": (4, 3), "free": (7, 6)}  # qpos, qvel
# Whole tasks of robosuite of which Robomimic has one object only.
_PARTS = {"NutAssembly": "NutAssemblySquare", "PickPlace": "PickPlaceCan"}

Float64Array = npt.NDArray[np.float64]


class HumanFile(RobomimicFile):
    """A file of robosuite's own layout: ``env_info`` instead of ``env_args``, no observations."""

    def _env_args(self, data: Any) -> str:
        if "env_args" in data.attrs:
            raise RobomimicFileError(
                f"{self.path} is in robomimic's layout (it has env_args): use `cmpolicy data "
                "convert robomimic`."
            )
        text = text_of(data.attrs.get("env_info", ""))
        try:
            info = json.loads(text)
            name, robots, controller = (
                info[key] for key in ("env_name", "robots", "controller_configs")
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RobomimicFileError(
                f"{self.path} lacks what says in which environment it was recorded: the attribute "
                "env_info of data, JSON with env_name, robots and controller_configs, which "
                f"robosuite writes from 1.0 on ({type(error).__name__}: {error})"
            ) from error
        if name in _PARTS:
            raise RecordedEnvError(
                f"{self.path}: recorded in {name!r}, the task with all of its objects; Robomimic's "
                f"is {_PARTS[name]!r}, with one. Its episodes are others, so the demonstrations "
                "lack a success of a Robomimic task."
            )
        kwargs = {"robots": robots, "controller_configs": controller, "control_freq": _CONTROL_FREQ}
        kwargs["control_freq"] = info.get("control_freq", _CONTROL_FREQ)
        version = text_of(data.attrs.get("repository_version", "")) or "1.0.0"
        return json.dumps(
            {"env_name": name, "env_version": version, "type": 1, "env_kwargs": kwargs}
        )

    def scene(self, demo: Demo) -> ET.Element:
        """MuJoCo XML that a demonstration was recorded with: in the file, or beside it.

        Raises:
            RobomimicFileError: there is none, or it is no XML.
        """
        text = demo.model or ""
        if text and not text.lstrip().startswith("<"):
            places = [self.path.parent / text, self.path.parent / "models" / text]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise RobomimicFileError(
                    f"{self.path}: {demo.name} lacks its scene {text}; looked for "
                    f"{' and '.join(map(str, places))}. Put it there."
                )
            text = found.read_text()
        try:
            return ET.fromstring(text)
        except ET.ParseError as error:
            raise RobomimicFileError(
                f"{self.path}: {demo.name} lacks a readable scene (model_file): {error}"
            ) from error


def convert(
    source: str | Path,
    out: str | Path,
    *,
    actions: str = "delta",
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert robosuite's own demonstrations of a Robomimic task to a store.

    The store is as `cmpolicy_data.convert.robomimic.convert` makes it, with the observations that
    robosuite 1.5 gives for the recorded states.

    Raises:
        FileNotFoundError, FileExistsError, RobomimicFileError, EnvArgsError, RecordedEnvError,
        ValueError: files, settings or demonstrations that cannot be used; each says what they lack.
        ImportError: h5py or robosuite is not installed.
    """
    began = time.monotonic()
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if actions not in ACTIONS:
        raise ValueError(f"actions must be {' or '.join(ACTIONS)}, got {actions!r}.")
    check_target(out)
    with HumanFile.open(source) as file:
        env = recorded_env(file.env_args, str(source))
        if env.actions != "delta":
            raise RobomimicFileError(
                f"{source}: recorded with absolute actions; only deltas can be converted."
            )
        simulator = _Simulator(env, actions)
        attrs = {
            "version": VERSION,
            "task": env.task.name,
            "env_args": env.env_args.to_json(),
            "actions": actions,
            "obs": list(simulator.keys),
            "demos": list(file.demos),
            "masks": {},
            "source": {"name": source.name},
        }

        def episodes() -> Iterator[ConvertedEpisode]:
            for done, name in enumerate(file.demos, 1):
                demo = file.demo(name, ())
                yield simulator.episode(demo, file.scene(demo), f"{source}, {name}")
                if progress is not None:
                    progress(done, len(file.demos))

        try:
            steps = write_store(out, CONVERTER, episodes(), attrs)
        finally:
            simulator.close()
    return ConversionReport(
        path=out,
        task=env.task.name,
        actions=actions,
        obs=tuple(simulator.keys),
        episodes=len(file.demos),
        steps=steps,
        masks={},
        goals_from_file=0,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True)
class Joint:
    """A joint of a scene: its name and how many numbers it has in qpos and qvel."""

    name: str
    n_qpos: int
    n_qvel: int


def scene_joints(scene: ET.Element) -> list[Joint]:
    """The joints of a scene in the order of its states, by the names of robosuite 1.5.

    Raises:
        ValueError: a joint without a name, or of a kind that MuJoCo does not have.
    """
    joints = []
    for element in scene.iter():
        if element.tag not in ("joint", "freejoint") or element.get("joint"):
            continue
        kind = "free" if element.tag == "freejoint" else element.get("type", "hinge")
        name = element.get("name")
        if name is None:  # default classes have joints too, of no body
            continue
        if kind not in _SIZES:
            raise ValueError(f"joint {name} is of the kind {kind!r}")
        # gripper0_finger_joint1 became gripper0_right_finger_joint1, cube_jnt0 became cube_joint0.
        if name.startswith("gripper") and "_right_" not in name:
            head, _, tail = name.partition("_")
            name = f"{head}_right_{tail}"
        joints.append(Joint(name.replace("_jnt", "_joint"), *_SIZES[kind]))
    return joints


def move_states(
    states: npt.ArrayLike, recorded: list[Joint], wanted: list[Joint], where: str
) -> Float64Array:
    """States (L, 1 + nq + nv) in the order of other joints; time then starts at 0.

    Raises:
        RecordedEnvError: the scenes have other joints, or the states another size.
    """
    values = np.asarray(states, np.float64)
    lacking = sorted({joint.name for joint in wanted} - {joint.name for joint in recorded})
    extra = sorted({joint.name for joint in recorded} - {joint.name for joint in wanted})
    if lacking or extra:
        raise RecordedEnvError(
            f"{where}: its scene is not that of robosuite 1.5: it lacks the joints "
            f"{', '.join(lacking) or 'none'} and has {', '.join(extra) or 'none'} more"
        )
    n_qpos = sum(joint.n_qpos for joint in recorded)
    size = 1 + n_qpos + sum(joint.n_qvel for joint in recorded)
    if values.ndim != 2 or values.shape[1] != size:
        raise RecordedEnvError(
            f"{where}: states have shape {values.shape}; its scene has {size} numbers (time, qpos, "
            "qvel)"
        )
    qpos, qvel, at, at_vel = {}, {}, 1, 1 + n_qpos
    for joint in recorded:
        qpos[joint.name] = values[:, at : at + joint.n_qpos]
        qvel[joint.name] = values[:, at_vel : at_vel + joint.n_qvel]
        at, at_vel = at + joint.n_qpos, at_vel + joint.n_qvel
    columns = [values[:, :1] - values[0, 0]]
    columns += [qpos[joint.name] for joint in wanted] + [qvel[joint.name] for joint in wanted]
    return np.concatenate(columns, axis=1)


class _Simulator:
    """robosuite 1.5 on the task of the demonstrations."""

    def __init__(self, env: RecordedEnv, actions: str) -> None:
        from cmpolicy_envs.robomimic import RobomimicEnv, low_dim_keys

        arms = range(env.task.n_arms)
        more = [f"robot{i}_{key}" for i in arms for key in ("joint_pos", "joint_vel")]
        more += [f"robot{i}_gripper_qvel" for i in arms]
        self.keys = [*low_dim_keys(env.task.n_arms), *more]
        self._recorded = env
        self._env = RobomimicEnv(
            task=env.task.name, env_args=env.env_args, actions="delta", keys=self.keys
        )
        self._env.reset(seed=0)
        self._model = str(self._env.get_state()["model"])
        self._joints = scene_joints(ET.fromstring(self._model))
        self._goals = goal_reader(env) if actions == "absolute" else None

    def episode(self, demo: Demo, scene: ET.Element, where: str) -> ConvertedEpisode:
        if demo.states is None:
            raise RobomimicFileError(f"{where} lacks states, which the observations follow from")
        if demo.actions.shape[1] != self._recorded.action_dim:
            raise RobomimicFileError(
                f"{where}: actions have {demo.actions.shape[1]} columns; "
                f"{self._recorded.task.name} takes {self._recorded.action_dim}"
            )
        states = move_states(demo.states, scene_joints(scene), self._joints, where)
        model = _with_cube_of(scene, self._model)
        obs: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in self.keys}
        success = False
        self._env.reset_to(states[0], model)
        for state in states:
            self._env.robosuite.sim.set_state_from_flattened(state)
            self._env.robosuite.sim.forward()
            for key, value in self._env.get_obs().items():
                obs[key].append(value)
            success |= self._env.is_success()
        if not success:  # the last action may be the one that succeeds
            self._env.reset_to(states[-1])
            success = self._env.step(demo.actions[-1])[-1]["is_success"]
        if not success:
            raise RecordedEnvError(
                f"{where}: none of its {len(states)} states counts as success in robosuite 1.5: it "
                "lacks a successful end, or its scene differs from today's"
            )
        action = demo.actions
        if self._goals is not None:
            action = absolute_actions(self._goals(Recording(states, demo.actions, model)))
        stacked = {key: np.stack(rows) for key, rows in obs.items()}
        return ConvertedEpisode(stacked, action, states, model)

    def close(self) -> None:
        self._env.close()


def _with_cube_of(scene: ET.Element, model: str) -> str:
    """``model`` with the cube, the one object whose size is drawn, as large as in ``scene``."""
    recorded = next((g for g in scene.iter("geom") if g.get("name") in ("cube", "cube_g0")), None)
    size = None if recorded is None else recorded.get("size")
    if size is None:
        return model
    tree = ET.fromstring(model)
    for geom in tree.iter("geom"):
        if (geom.get("name") or "").startswith("cube_g0"):
            geom.set("size", size)
    return ET.tostring(tree, encoding="unicode")
