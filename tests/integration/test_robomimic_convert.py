"""Conversion with the simulator: absolute actions, open-loop replay."""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scipy.spatial.transform import Rotation

from cmpolicy.cli.main import main as command
from cmpolicy.cli.train import compose
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.goals import Recording, goal_reader
from cmpolicy_data.convert.recorded_env import recorded_env
from cmpolicy_data.convert.replay import ReplayError, replay
from cmpolicy_data.convert.robomimic import convert
from cmpolicy_data.convert.workers import map_in_order
from cmpolicy_envs.robomimic_args import default_env_args
from cmpolicy_envs.rotations import rot6d_to_matrix


def main(words: Sequence[str]) -> int:
    """``cmpolicy data``."""
    return command(["data", *words])


h5py = pytest.importorskip("h5py")
pytest.importorskip("robosuite")

EPISODES = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of Lift that succeed: above the cube, down, close, up; some turning."""
    from cmpolicy_envs.robomimic import RobomimicEnv

    path = tmp_path_factory.mktemp("lift") / "lift.hdf5"
    env = RobomimicEnv("lift")
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = default_env_args("lift").to_json()
        for number in range(EPISODES):
            rng = np.random.default_rng(number)
            obs, _ = env.reset(seed=number)
            model = env.get_state()["model"]
            rows: dict[str, list[Any]] = {"states": [], "actions": [], "object": []}
            rows |= {f"robot0_{key}": [] for key in ("eef_pos", "eef_quat", "gripper_qpos")}
            closed = success = False
            for step in range(80):
                cube, hand = obs["object"][:3], obs["robot0_eef_pos"]
                aside = np.linalg.norm((cube - hand)[:2])
                target = cube.copy()
                target[2] += 0.06 if aside > 0.015 and not closed else 0
                closed = closed or (np.linalg.norm(hand - cube) < 0.01 and step > 10)
                if closed and obs["robot0_gripper_qpos"][0] < 0.025:
                    target = hand + np.array([0, 0, 0.05])
                turn = rng.uniform(-0.1, 0.1, 3)
                move = np.clip((target - hand) / 0.05, -1, 1)
                action = np.concatenate([move, turn, [1.0 if closed else -1.0]])
                for key, value in {"states": env.get_state()["states"], "actions": action}.items():
                    rows[key].append(value)
                for key, value in obs.items():
                    rows[key].append(value)
                obs, _, success, _, _ = env.step(action)
                if success:
                    break
            assert success, "the fixture itself must lift the cube"
            demo = data.create_group(f"demo_{number}")
            demo.attrs["model_file"], demo.attrs["num_samples"] = model, len(rows["actions"])
            for key, values in rows.items():
                demo[key if key in ("states", "actions") else f"obs/{key}"] = np.array(values)
        data.attrs["total"] = sum(data[name].attrs["num_samples"] for name in data)
    env.close()
    return path


@pytest.fixture(scope="module")
def absolute(source: Path) -> Path:
    """The demonstrations as a store with absolute actions."""
    out = source.parent / "absolute.zarr"
    convert(source, out, actions="absolute")
    return out


def stacked(path: Path, key: str) -> Any:
    with h5py.File(path) as file:
        return np.concatenate([file[f"data/demo_{i}/{key}"][()] for i in range(EPISODES)])


def changed(path: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    """A changed copy of a file."""
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    with h5py.File(copy, "r+") as file:
        change(file)
    return copy


class TestAbsolute:
    def test_goals_are_the_pose_plus_the_scaled_delta(self, source: Path, absolute: Path):
        actions, stored = stacked(source, "actions"), ReplayBuffer.open(absolute)["action"][:]
        assert stored.shape == (len(actions), 10)
        # OSC_POSE at its default scale: 0.05 m and 0.5 rad for an action of 1.
        at = stacked(source, "obs/robot0_eef_pos")
        np.testing.assert_allclose(stored[:, :3], at + 0.05 * actions[:, :3], atol=1e-6)
        np.testing.assert_array_equal(stored[:, 9], actions[:, 6])
        # The controller turns its reference site, which is fixed to the body that eef_quat is of.
        hand = Rotation.from_quat(stacked(source, "obs/robot0_eef_quat"))
        turned = Rotation.from_rotvec(0.5 * actions[:, 3:6]) * hand
        fixed = turned.inv() * Rotation.from_matrix(rot6d_to_matrix(stored[:, 3:9]))
        assert (fixed[0].inv() * fixed).magnitude().max() < 1e-5

    def test_a_controller_in_the_frame_of_the_base(
        self, source: Path, absolute: Path, tmp_path: Path
    ):
        def to_base(file: Any) -> None:
            args = json.loads(file["data"].attrs["env_args"])
            right = args["env_kwargs"]["controller_configs"]["body_parts"]["right"]
            right["input_ref_frame"] = "base"
            file["data"].attrs["env_args"] = json.dumps(args)

        # A Lift robot stands away from the origin, not turned: deltas mean the same in both frames.
        copy = changed(source, tmp_path, to_base)
        convert(copy, tmp_path / "x.zarr", actions="absolute", workers=2)
        np.testing.assert_allclose(
            ReplayBuffer.open(tmp_path / "x.zarr")["action"][:],
            ReplayBuffer.open(absolute)["action"][:],
            atol=1e-6,
        )

    @pytest.mark.parametrize("which", [0, 1])
    def test_the_goals_that_a_file_has_are_used(
        self, source: Path, absolute: Path, tmp_path: Path, which: int
    ):
        def add(file: Any) -> None:
            file[f"data/demo_{which}/actions_abs"] = np.ones_like(
                file[f"data/demo_{which}/actions"][()]
            )

        copy = changed(source, tmp_path, add)
        assert convert(copy, tmp_path / "x.zarr", actions="absolute").goals_from_file == 1
        stored, recovered = (
            np.split(buffer["action"][:], buffer.episode_ends[:-1])
            for buffer in (ReplayBuffer.open(tmp_path / "x.zarr"), ReplayBuffer.open(absolute))
        )
        np.testing.assert_array_equal(stored[which][:, [0, 1, 2, 9]], 1)
        np.testing.assert_array_equal(stored[1 - which], recovered[1 - which])

    def test_two_arms(self):
        from cmpolicy_envs.robomimic import RobomimicEnv

        env = RobomimicEnv("transport")
        obs, _ = env.reset(seed=0)
        state, actions = env.get_state()["states"], np.linspace(-1, 1, 14)[None]
        env.close()
        reader = goal_reader(recorded_env(default_env_args("transport").to_json(), "test"))
        goals = reader(Recording(state[None], actions, None))
        for i, start in enumerate((0, 7)):
            at = obs[f"robot{i}_eef_pos"] + 0.05 * actions[0, start : start + 3]
            np.testing.assert_allclose(goals[0, start : start + 3], at, atol=1e-6)
            assert goals[0, start + 6] == actions[0, start + 6]

    def test_states_of_another_scene(self, source: Path, tmp_path: Path):
        def cut(file: Any) -> None:
            for name in file["data"]:
                states = file[f"data/{name}/states"][:, :-1]
                del file[f"data/{name}/states"]
                file[f"data/{name}/states"] = states

        with pytest.raises(ValueError, match=r"a state of .* is 32 finite numbers"):
            convert(changed(source, tmp_path, cut), tmp_path / "x.zarr", actions="absolute")
        assert not (tmp_path / "x.zarr").exists()


class TestReplay:
    @pytest.mark.parametrize("actions", ["delta", "absolute"])
    def test_converted_episodes_succeed_again(
        self, source: Path, absolute: Path, tmp_path: Path, actions: str
    ):
        store = absolute
        if actions == "delta":
            store = tmp_path / "delta.zarr"
            convert(source, store)
        told: list[tuple[int, int]] = []
        report = replay(store, progress=lambda *counts: told.append(counts))
        assert report.failed == ()
        assert report.success_rate == 1.0
        assert (report.task, report.actions, report.episodes) == ("lift", actions, EPISODES)
        assert told == [(1, 0), (2, 0)]

    def test_wrong_actions_fail(self, absolute: Path, tmp_path: Path):
        store = tmp_path / "wrong.zarr"
        buffer = ReplayBuffer.create(store, attrs=ReplayBuffer.open(absolute).attrs)
        good = ReplayBuffer.open(absolute)
        first = int(good.episode_ends[0])
        for start, end, sign in ((0, first, 1), (first, None, -1)):
            action = good["action"][start:end]
            action[:, 9] *= sign  # opens the gripper where it should close
            buffer.append_episode({"action": action, "state": good["state"][start:end]})
        report = replay(store)  # without scenes: of the cube's size, which is drawn, nothing hangs
        assert report.failed == (1,)
        assert report.success_rate == 0.5
        assert replay(store, episodes=1).failed == ()

    def test_stores_that_cannot_be_replayed(self, source: Path, tmp_path: Path):
        buffer = ReplayBuffer.create(tmp_path / "plain.zarr", attrs={"task": "lift"})
        buffer.append_episode({"action": np.zeros((3, 7))})
        lacks = r"lacks the attribute env_args, the attribute actions, data/state"
        with pytest.raises(ReplayError, match=lacks):
            replay(tmp_path / "plain.zarr")
        convert(source, tmp_path / "x.zarr")
        with pytest.raises(ReplayError, match=r"no episodes to replay \(episodes=0\)"):
            replay(tmp_path / "x.zarr", episodes=0)
        with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
            replay(tmp_path / "x.zarr", workers=0)
        zarr.open_group(tmp_path / "x.zarr", mode="r+").attrs["env_args"] = "{"
        with pytest.raises(ValueError, match="attribute env_args: env_args is not valid JSON"):
            replay(tmp_path / "x.zarr")


class TestWorkers:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_results_come_in_order(self, workers: int):
        numbers = [3, 1000, 0, 7, 2**40, 5, 6, 80]
        found = list(map_in_order(partial(methodcaller, "bit_length"), numbers, workers))
        assert found == [n.bit_length() for n in numbers]

    def test_a_process_that_dies_is_an_error(self):
        with pytest.raises(ChildProcessError, match="simulator process died"):
            list(map_in_order(partial(os._exit, 3), [1, 2], 2))

    def test_errors_of_the_work_come_through(self):
        with pytest.raises(AttributeError, match="no_such_method"):
            list(map_in_order(partial(methodcaller, "no_such_method"), [1], 2))


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    def test_convert_and_replay(
        self,
        capsys: pytest.CaptureFixture[str],
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.chdir(tmp_path)
        status, out, err = self.run(
            capsys,
            "convert",
            "robomimic",
            source,
            "actions=absolute",
            "obs=[object,robot0_eef_pos]",
        )
        assert (status, err) == (0, "")
        assert out.startswith("lift_abs.zarr: lift, 2 episode(s), ")
        assert "absolute actions" in out
        assert "cmpolicy data replay robomimic lift_abs.zarr" in out
        assert ReplayBuffer.open("lift_abs.zarr").attrs["obs"] == ["object", "robot0_eef_pos"]
        status, out, err = self.run(capsys, "replay", "robomimic", "lift_abs.zarr", "episodes=1")
        assert (status, err) == (0, "")
        assert out.startswith("lift_abs.zarr: 1 of 1 episodes succeed again with absolute actions")
        assert "(100.0%, " in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["convert", "robomimic", "nope.hdf5", "out=x.zarr"], "There is no file nope.hdf5"),
            (["convert", "robomimic", "SOURCE", "out=x.hdf5"], "ending in .zarr"),
            (["convert", "robomimic", "SOURCE", "out=x.zarr", "filter=test"], "no filter 'test'"),
            (["convert", "robomimic", "SOURCE", "workers=two"], "workers must be a whole number"),
            (["convert", "robomimic", "SOURCE", "mode=delta"], "unknown setting 'mode'"),
            (["convert", "robosuite", "SOURCE"], "unknown layout 'robosuite'"),
            (["replay", "robomimic", "nope.zarr"], "There is no data at nope.zarr"),
        ],
    )
    def test_errors(
        self,
        capsys: pytest.CaptureFixture[str],
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        message: str,
    ):
        monkeypatch.chdir(tmp_path)
        status, out, err = self.run(
            capsys, *(str(source) if a == "SOURCE" else a for a in arguments)
        )
        assert (status, out) == (2, "")
        assert err.startswith("cmpolicy data: ")
        assert message in err
        assert list(tmp_path.iterdir()) == []


def test_cameras_are_rendered_at_the_recorded_states(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a policy is trained on is what it sees in the simulator, and it fits the protocol."""
    from cmpolicy.experiment.train import train
    from cmpolicy_envs.offscreen import OpenGLError
    from cmpolicy_envs.robomimic import RobomimicEnv

    cameras = ("agentview", "robot0_eye_in_hand")
    try:
        env = RobomimicEnv("lift", cameras=cameras)
    except OpenGLError as error:
        pytest.skip(str(error))
    few = tmp_path / "few.hdf5"
    with h5py.File(source) as whole, h5py.File(few, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = whole["data"].attrs["env_args"]
        for name in ("demo_0", "demo_1"):
            demo, copy = whole["data"][name], data.create_group(name)
            copy.attrs.update(demo.attrs)
            copy.attrs["num_samples"] = 3
            for key in ("states", "actions", *(f"obs/{k}" for k in demo["obs"])):
                copy[key] = demo[key][:3]
        model, states = whole["data/demo_1"].attrs["model_file"], whole["data/demo_1/states"][:3]
    out = tmp_path / "few.zarr"
    words = ["convert", "robomimic", str(few), f"out={out}", f"cameras=[{','.join(cameras)}]"]
    assert main(words) == 0
    buffer = ReplayBuffer.open(out)
    assert buffer["agentview_image"].shape == (6, 84, 84, 3)
    for row in (0, 2):
        seen = env.reset_to(states[row], model)
        for camera in cameras:
            stored = np.asarray(buffer[f"{camera}_image"][3 + row]).astype(int)
            assert np.abs(stored - seen[f"{camera}_image"]).mean() < 1
    env.close()
    tiny = ["net.down_dims=[8,16]", "net.n_groups=4", "encoder.width=8", "device=cpu"]
    short = ["examples=8", "batch_size=8", "optim.warmup=0", "log.trackers=[]", "eval.windows=8"]
    rollouts = ["eval.episodes=1", "eval.workers=1", "eval.every=1000", "data.val_fraction=0"]
    preset = compose("task=lift_image", f"data.path={out}")
    printed = capsys.readouterr().out.splitlines()[-1]
    advice = shlex.split(printed.removeprefix("train on it with: cmpolicy train "))
    config = compose(*advice, *tiny, *short, *rollouts)
    assert config.data.obs == preset.data.obs
    assert config.task.protocol == preset.task.protocol
    policy = train(config, tmp_path / "run", until=0).load_policy()  # checked against the simulator
    assert policy.spec.images == ("agentview_image", "robot0_eye_in_hand_image")
