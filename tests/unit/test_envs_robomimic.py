"""The Robomimic environments: robosuite's physics, reproducible to the bit, errors that help."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("robosuite", reason="needs the extra cmpolicy[robomimic]")

from gymnasium.utils.env_checker import check_env

import cmpolicy_envs  # noqa: F401  (registers the environments)
from cmpolicy_envs.robomimic import RobomimicEnv
from cmpolicy_envs.robomimic_args import EnvArgs, EnvArgsError, default_env_args
from cmpolicy_envs.robomimic_tasks import TASKS
from cmpolicy_envs.robosuite_control import FastControl
from cmpolicy_envs.robosuite_make import make_robosuite
from cmpolicy_envs.rotations import canonical_quat, matrix_to_rot6d, quat_to_matrix

Make = Callable[..., RobomimicEnv]
# Numbers of the observations in robomimic's data sets.
OBJECT = {"lift": 10, "can": 14, "square": 14, "transport": 41, "tool_hang": 44}


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Environments that the tests of this file share; they take a second to make."""
    made: list[RobomimicEnv] = []

    @cache
    def get(task: str, actions: str = "delta") -> RobomimicEnv:
        made.append(RobomimicEnv(task, actions=actions))
        return made[-1]

    yield get
    for env in made:
        env.close()


def random_actions(env: RobomimicEnv, n: int, seed: int = 0) -> np.ndarray:
    """Deltas, or targets around the present place of each arm."""
    rng = np.random.default_rng(seed)
    arms = env.task.n_arms
    if env.actions == "delta":
        return rng.uniform(-1, 1, (n, 7 * arms))
    obs = env.get_obs()
    parts = []
    for arm in range(arms):
        place = obs[f"robot{arm}_eef_pos"] + rng.uniform(-0.05, 0.05, (n, 3))
        turned = matrix_to_rot6d(quat_to_matrix(obs[f"robot{arm}_eef_quat"]))
        parts += [place, turned + rng.normal(0, 0.05, (n, 6)), rng.uniform(-1, 1, (n, 1))]
    return np.concatenate(parts, axis=1)


def run(env: RobomimicEnv, actions: np.ndarray) -> list[Any]:
    """States and observations along the way."""
    trace: list[Any] = [env.get_state()["states"]]
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        trace += [env.get_state()["states"], obs, reward, terminated, truncated, info]
    return trace


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                np.testing.assert_array_equal(x[key], y[key])
        else:
            np.testing.assert_array_equal(x, y)


def test_gymnasium_finds_nothing_to_object_to(make: Make) -> None:
    for actions in ("delta", "absolute"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(make("lift", actions), skip_render_check=True)
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        # Places have no bounds and targets are metres, as in the data.
        expected = ("Box observation space m", "symmetric and normalized")
        assert [t for t in texts if not any(part in t for part in expected)] == []


@pytest.mark.parametrize("task", TASKS)
def test_ids_make_the_tasks_with_robomimics_keys(task: str) -> None:
    with gymnasium.make(TASKS[task].gym_id) as env:
        arms = TASKS[task].n_arms
        shapes = {"object": (OBJECT[task],)}
        for arm in range(arms):
            sizes = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
            shapes |= {f"robot{arm}_{key}": (n,) for key, n in sizes.items()}
        obs, info = env.reset(seed=0)
        assert {key: value.shape for key, value in obs.items()} == shapes
        assert {value.dtype for value in obs.values()} == {np.dtype(np.float32)}
        assert info == {"is_success": False}
        assert obs in env.observation_space
        assert env.action_space.shape == (7 * arms,)
        assert env.spec is not None
        assert env.spec.max_episode_steps == (400 if task in ("lift", "can", "square") else 700)


@pytest.mark.parametrize("task", ["lift", "square", "transport"])
def test_a_seed_is_a_start_whatever_went_before(make: Make, task: str) -> None:
    env = make(task)
    actions = random_actions(env, 4)
    env.reset(seed=7)
    first, xml = run(env, actions), env.get_state()["model"]
    env.reset(seed=8)
    other = run(env, actions)
    env.reset(seed=7)
    assert_same(run(env, actions), first)
    assert env.get_state()["model"] == xml
    assert not np.array_equal(other[0], first[0])
    env.reset(seed=7)
    env.reset()
    unseeded = env.get_state()["states"]
    assert not np.array_equal(unseeded, first[0])
    env.reset(seed=7)
    env.reset()
    np.testing.assert_array_equal(env.get_state()["states"], unseeded)


def test_another_process_starts_and_moves_the_same(make: Make) -> None:
    code = (
        "import sys, json, numpy as np\n"
        "from cmpolicy_envs.robomimic import RobomimicEnv\n"
        "env = RobomimicEnv('can')\n"
        "env.reset(seed=11)\n"
        "for action in np.random.default_rng(0).uniform(-1, 1, (4, 7)): env.step(action)\n"
        "print('STATE', json.dumps(env.get_state()['states'].tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "WARNING" not in done.stdout + done.stderr  # robosuite's greetings
    line = next(line for line in done.stdout.splitlines() if line.startswith("STATE"))
    env = make("can")
    env.reset(seed=11)
    final = run(env, random_actions(env, 4))[-6]
    np.testing.assert_array_equal(json.loads(line.removeprefix("STATE ")), final)


@pytest.mark.parametrize("task", TASKS)
def test_which_models_vary(make: Make, task: str) -> None:
    # Else a reset that keeps the model would keep what robosuite draws anew.
    env = make_robosuite(default_env_args(task))
    xmls = []
    for _ in range(2):
        env.reset()
        xmls.append(env.model.get_xml())
    env.close()
    assert (xmls[0] != xmls[1]) == TASKS[task].model_varies


def test_starts_vary_as_in_robosuite(make: Make) -> None:
    env = make("can")
    starts = []
    for seed in range(12):
        obs, _ = env.reset(seed=seed)
        starts.append(obs["object"][:2])
    spread = np.ptp(starts, axis=0)
    assert (spread > 0.1).all()  # the bin that a can starts in is 0.39 m by 0.49 m


@pytest.mark.parametrize(
    ("task", "actions"),
    [("lift", "delta"), ("square", "absolute"), ("transport", "delta"), ("transport", "absolute")],
)
def test_steps_are_those_of_robosuite_to_the_bit(make: Make, task: str, actions: str) -> None:
    env = make(task, actions)
    for seed in (3, 4):
        env.reset(seed=seed)
        chosen = random_actions(env, 12)
        theirs = []
        for action in chosen:
            env.robosuite.step(env._to_robosuite(action))
            theirs.append(env.get_state()["states"])
        env.reset(seed=seed)
        ours = []
        for action in chosen:
            env.step(action)
            ours.append(env.get_state()["states"])
        np.testing.assert_array_equal(ours, theirs)
        assert np.abs(theirs[0] - theirs[-1]).max() > 0.01


def test_control_in_the_frame_of_a_turned_base_is_robosuites_too() -> None:
    args = default_env_args("transport")
    right = args.env_kwargs["controller_configs"]["body_parts"]["right"]
    right |= {"input_ref_frame": "base", "uncouple_pos_ori": False}
    env = RobomimicEnv("transport", env_args=args)
    actions = random_actions(env, 6)
    env.reset(seed=1)
    theirs = [env.robosuite.step(action) and env.get_state()["states"] for action in actions]
    env.reset(seed=1)
    control = FastControl(env.robosuite)
    for action, state in zip(actions, theirs, strict=True):
        control.step(action)
        np.testing.assert_array_equal(env.get_state()["states"], state)
    env.close()


def test_physics_of_older_data_differs_little(make: Make) -> None:
    args = default_env_args("can")
    args = replace(args, env_kwargs={**args.env_kwargs, "lite_physics": False})
    old = RobomimicEnv("can", env_args=args)
    new = make("can")
    actions = random_actions(new, 6)
    traces = []
    for env in (old, new):
        env.reset(seed=2)
        traces.append(run(env, actions))
    np.testing.assert_array_equal(traces[0][0], traces[1][0])
    np.testing.assert_allclose(traces[0][-6], traces[1][-6], atol=1e-3)
    old.close()


@pytest.mark.parametrize("task", ["lift", "can", "tool_hang"])
def test_a_restored_start_goes_on_to_the_bit(make: Make, task: str) -> None:
    env = make(task)
    actions = random_actions(env, 5)
    env.reset(seed=21)
    start = env.get_state()
    original = run(env, actions)
    middle, seen = env.get_state(), original[-5]
    env.reset(seed=22)
    env.reset_to(start["states"], start["model"])
    assert_same(run(env, actions), original)
    # Observations are a function of the state.
    restored = env.reset_to(middle["states"])
    assert_same([restored], [seen])
    env.reset(options={"reset_to": start})
    assert_same(run(env, actions), original)
    env.reset(seed=21)  # and the model of its own resets is back
    assert env.get_state()["model"] == start["model"]
    assert_same(run(env, actions), original)


def test_a_state_of_another_model_brings_its_model(make: Make) -> None:
    env = make("lift")
    sizes, starts = [], []
    for seed in (1, 2):
        env.reset(seed=seed)
        starts.append(env.get_state())
    for start in (starts[0], starts[1], starts[0]):
        env.reset_to(start["states"], start["model"])
        model = env.robosuite.sim.model
        sizes.append(model.geom_size[model.geom_name2id("cube_g0")].copy())
    np.testing.assert_array_equal(sizes[0], sizes[2])
    assert not np.array_equal(sizes[0], sizes[1])
    assert (np.array(sizes) >= 0.02).all()
    assert (np.array(sizes) <= 0.022).all()


def test_states_that_fit_nothing_are_errors(make: Make) -> None:
    env = make("lift")
    env.reset(seed=0)
    state = env.get_state()
    for wrong in (state["states"][:-1], np.full_like(state["states"], np.nan)):
        with pytest.raises(ValueError, match="32 finite numbers"):
            env.reset_to(wrong)
    with pytest.raises(ValueError, match=r"recorded model cannot be loaded .*ParseError"):
        env.reset_to(state["states"], "<mujoco")
    with pytest.raises(ValueError, match="unknown reset option 'reset_to_state'; known: reset_to"):
        env.reset(options={"reset_to_state": state})
    with pytest.raises(ValueError, match=r"reset_to needs a mapping with 'states'.*got list"):
        env.reset(options={"reset_to": [0.0]})
    env.reset(seed=0)  # it has recovered
    np.testing.assert_array_equal(env.get_state()["states"], state["states"])


def test_observations_are_of_the_state_after_the_step(make: Make) -> None:
    env = make("can")
    env.reset(seed=5)
    for _ in range(5):
        obs, *_ = env.step([0.5, 0.5, -0.5, 0, 0, 0.5, -1])
    sim, robot = env.robosuite.sim, env.robosuite.robots[0]
    sim.forward()
    site = sim.data.site_xpos[robot.eef_site_id["right"]]
    np.testing.assert_allclose(obs["robot0_eef_pos"], site, atol=1e-7)
    body = sim.data.get_body_xquat(robot.robot_model.eef_name["right"])[[1, 2, 3, 0]]
    np.testing.assert_allclose(obs["robot0_eef_quat"], canonical_quat(body), atol=1e-7)
    can = sim.data.body_xpos[sim.model.body_name2id("Can_main")]
    np.testing.assert_allclose(obs["object"][7:10], can, atol=1e-7)
    # In the frame of the gripper.
    hand = quat_to_matrix(obs["robot0_eef_quat"])
    relative = hand.T @ (can - obs["robot0_eef_pos"])
    np.testing.assert_allclose(obs["object"][:3], relative, atol=1e-6)


def test_other_keys_can_be_observed(make: Make) -> None:
    env = RobomimicEnv("lift", keys=["robot0_joint_pos", "object", "robot0_gripper_qvel"])
    obs, _ = env.reset(seed=0)
    assert {k: v.shape for k, v in obs.items()} == {
        "robot0_joint_pos": (7,),
        "object": (10,),
        "robot0_gripper_qvel": (2,),
    }
    expected, _ = make("lift").reset(seed=0)
    np.testing.assert_array_equal(obs["object"], expected["object"])
    env.close()
    with pytest.raises(ValueError, match="observes no 'eef_pos'; known: object, robot0_joint_pos"):
        RobomimicEnv("lift", keys=["eef_pos"])


def test_absolute_targets_are_reached(make: Make) -> None:
    for task in ("lift", "transport"):
        env = make(task, "absolute")
        obs, _ = env.reset(seed=1)
        targets = []
        for arm in range(env.task.n_arms):
            turned = quat_to_matrix(obs[f"robot{arm}_eef_quat"])
            site = env.robosuite.robots[arm].part_controllers["right"].ref_ori_mat
            yaw = 0.3
            turn = np.array(
                [[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
            )
            place = obs[f"robot{arm}_eef_pos"] + [0.04, -0.03, 0.06]
            targets.append((place, turn @ site, turn @ turned))
        action = np.concatenate(
            [np.concatenate([place, matrix_to_rot6d(site), [-1]]) for place, site, _ in targets]
        )
        for _ in range(40):
            obs, *_ = env.step(action)
        for arm, (place, _, turned) in enumerate(targets):
            np.testing.assert_allclose(obs[f"robot{arm}_eef_pos"], place, atol=0.01)
            reached = quat_to_matrix(obs[f"robot{arm}_eef_quat"])
            np.testing.assert_allclose(reached, turned, atol=0.05)


def test_deltas_beyond_the_box_are_clipped_and_nonsense_is_an_error(make: Make) -> None:
    env = make("lift")
    ends = []
    for size in (1.0, 50.0):
        env.reset(seed=1)
        env.step(np.full(7, size))
        ends.append(env.get_state()["states"])
    np.testing.assert_array_equal(*ends)
    for wrong in (np.zeros(10), np.zeros((1, 7)), np.full(7, np.nan), [np.inf] * 7):
        with pytest.raises(ValueError, match="lift takes delta actions of 7 finite numbers, got"):
            env.step(wrong)
    absolute = make("lift", "absolute")
    absolute.reset(seed=0)
    with pytest.raises(ValueError, match="takes absolute actions of 10 finite numbers"):
        absolute.step(np.zeros(7))
    with pytest.raises(ValueError, match="0 or parallel"):
        absolute.step(np.zeros(10))


def test_success_ends_the_episode_with_reward_1(make: Make) -> None:
    env = make("lift")
    env.reset(seed=0)
    state = env.get_state()["states"].copy()
    model = env.robosuite.sim.model
    address = model.get_joint_qpos_addr("cube_joint0")[0]
    state[1 + address + 2] += 0.3  # the cube, in the air
    env.reset_to(state)
    assert env.is_success()
    _, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})
    env.reset(seed=0)
    assert env.step(np.zeros(7))[1:4] == (0.0, False, False)


def test_env_args_of_a_file_build_the_environment(make: Make) -> None:
    # Names and settings of robosuite's cameras and viewers, as files hold them, mean nothing here.
    args = default_env_args("can")
    more = {"camera_names": ["agentview"], "camera_depths": False, "render_gpu_device_id": 0}
    env = RobomimicEnv(
        "can", env_args=EnvArgs(args.env_name, "1.5.1", 1, {**args.env_kwargs, **more})
    )
    env.reset(seed=4)
    make("can").reset(seed=4)
    np.testing.assert_array_equal(env.get_state()["states"], make("can").get_state()["states"])
    env.close()


@pytest.mark.parametrize(
    ("task", "name", "kwargs", "message"),
    [
        ("can", "Lift", {}, "env_name is 'Lift', but the task 'can' is 'PickPlaceCan'"),
        ("lift", "Lift", {"gravity": 3}, r"env_kwargs\.gravity is no argument of robosuite 1\."),
        ("lift", "Lift", {"robots": ["UR5e"]}, r"env_kwargs\.robots is \['UR5e'\]"),
    ],
)
def test_env_args_that_cannot_be_carried_out(
    task: str, name: str, kwargs: dict[str, Any], message: str
) -> None:
    given = {**default_env_args("lift").env_kwargs, **kwargs}
    with pytest.raises(EnvArgsError, match=message):
        RobomimicEnv(task, env_args=EnvArgs(name, "1.5.2", 1, given))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="unknown Robomimic task 'stack'"):
        RobomimicEnv("stack")
    with pytest.raises(ValueError, match="actions must be 'delta' or 'absolute', got 'joint'"):
        RobomimicEnv("lift", actions="joint")
    with pytest.raises(ValueError, match="render_mode must be None or 'rgb_array', got 'human'"):
        RobomimicEnv("lift", render_mode="human")
    with pytest.raises(ValueError, match="there is no camera 'sideview2'; known: frontview"):
        RobomimicEnv("lift", cameras=["sideview2"])


def test_delta_actions_on_an_absolute_controller() -> None:
    args = default_env_args("lift")
    args.env_kwargs["controller_configs"]["body_parts"]["right"]["input_type"] = "absolute"
    with pytest.raises(EnvArgsError, match="input_type is 'absolute', but actions='delta'"):
        RobomimicEnv("lift", env_args=args)


def test_importing_stays_light_and_a_missing_simulator_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "import cmpolicy_envs, cmpolicy_envs.robomimic, cmpolicy_envs.robomimic_args\n"
        "assert not {'robosuite', 'mujoco', 'robomimic', 'torch'} & set(sys.modules)\n"
        "sys.modules['robosuite'] = sys.modules['robomimic'] = None\n"
        "for name in ('cmpolicy_envs.robomimic', 'cmpolicy_envs.robomimic_base'):\n"
        "    try:\n"
        "        __import__(name, fromlist=['x']).RobomimicEnv('lift')\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "the Robomimic tasks need robosuite",
        "the Robomimic tasks need robomimic",
    ]
    assert all("pip install 'cmpolicy[robomimic]'" in line for line in lines)
