"""Conversion without a simulator: delta actions, goals that the file has, and what is refused."""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy.cli.main import main as command
from cmpolicy_data import ReplayBuffer, load_demonstrations, validate
from cmpolicy_data.convert import writing
from cmpolicy_data.convert.goals import absolute_actions
from cmpolicy_data.convert.recorded_env import RecordedEnvError
from cmpolicy_data.convert.robomimic import convert
from cmpolicy_data.convert.scenes import read_scenes
from cmpolicy_data.robomimic_file import RobomimicFileError
from cmpolicy_envs.robomimic_args import EnvArgs, EnvArgsError, default_env_args
from cmpolicy_envs.rotations import axis_angle_to_matrix, canonical_quat, rot6d_to_matrix


def main(words: Sequence[str]) -> int:
    """``cmpolicy data``."""
    return command(["data", *words])


h5py = pytest.importorskip("h5py")

Write = Callable[..., Path]
OBS = ["object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]


@pytest.fixture
def source(tmp_path: Path, write_robomimic: Write) -> Path:
    return write_robomimic(tmp_path / "demos.hdf5", lengths=(5, 3, 4))


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def stacked(path: Path, key: str, names: tuple[str, ...] = ("demo_0", "demo_1", "demo_2")) -> Any:
    with h5py.File(path) as file:
        return np.concatenate([file[f"data/{name}/{key}"][()] for name in names])


def set_env(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    def apply(file: Any) -> None:
        args = json.loads(file["data"].attrs["env_args"])
        change(args)
        file["data"].attrs["env_args"] = json.dumps(args)

    return edit(path, apply)


def arm(args: dict[str, Any]) -> dict[str, Any]:
    return args["env_kwargs"]["controller_configs"]["body_parts"]["right"]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestDelta:
    def test_arrays_are_those_of_the_file(self, source: Path, tmp_path: Path):
        told: list[tuple[int, int]] = []
        report = convert(
            source, tmp_path / "x.zarr", progress=lambda done, total: told.append((done, total))
        )
        assert validate(tmp_path / "x.zarr", ["action", "state", *OBS]) == []
        buffer = ReplayBuffer.open(tmp_path / "x.zarr")
        assert buffer.episode_ends.tolist() == [5, 8, 12]
        assert buffer.keys() == sorted(["action", "state", *OBS])
        np.testing.assert_array_equal(
            buffer["action"][:], stacked(source, "actions").astype(np.float32)
        )
        np.testing.assert_array_equal(buffer["state"][:], stacked(source, "states"))
        assert buffer["state"].dtype == np.float64
        for key in ("object", "robot0_eef_pos", "robot0_gripper_qpos"):
            expected = stacked(source, f"obs/{key}").astype(np.float32)
            np.testing.assert_array_equal(buffer[key][:], expected)
        assert (report.episodes, report.steps, report.task) == (3, 12, "lift")
        assert report.obs == tuple(OBS)
        assert told == [(1, 3), (2, 3), (3, 3)]

    def test_quaternions_get_the_sign_of_the_environment(self, source: Path, tmp_path: Path):
        convert(source, tmp_path / "x.zarr")
        quat = stacked(source, "obs/robot0_eef_quat")
        assert (quat[:, 0] < 0).any()
        stored = ReplayBuffer.open(tmp_path / "x.zarr")["robot0_eef_quat"][:]
        np.testing.assert_array_equal(stored, canonical_quat(quat).astype(np.float32))

    def test_attributes(self, source: Path, tmp_path: Path):
        convert(source, tmp_path / "x.zarr")
        attrs = ReplayBuffer.open(tmp_path / "x.zarr").attrs
        assert EnvArgs.from_json(attrs["env_args"]) == default_env_args("lift")
        del attrs["env_args"]
        assert attrs == {
            "converter": "cmpolicy_data.convert.robomimic",
            "version": 1,
            "task": "lift",
            "actions": "delta",
            "obs": OBS,
            "demos": ["demo_0", "demo_1", "demo_2"],
            "masks": {"train": [0, 1], "valid": [2]},
            "source": {
                "name": "demos.hdf5",
                "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            },
        }

    def test_order_is_numeric(self, tmp_path: Path, write_robomimic: Write):
        source = write_robomimic(tmp_path / "d.hdf5", lengths=range(2, 14), first=1)
        convert(source, tmp_path / "x.zarr")
        buffer = ReplayBuffer.open(tmp_path / "x.zarr")
        assert np.diff(buffer.episode_ends, prepend=0).tolist() == list(range(2, 14))
        scenes = read_scenes(tmp_path / "x.zarr", 12)
        assert scenes == [f'<mujoco model="demo_{i}"/>' for i in range(1, 13)]

    def test_a_filter_and_chosen_keys(self, source: Path, tmp_path: Path):
        report = convert(
            source, tmp_path / "x.zarr", filter_key="valid", keys=["robot0_eef_pos", "object"]
        )
        buffer = ReplayBuffer.open(tmp_path / "x.zarr")
        assert buffer.keys() == ["action", "object", "robot0_eef_pos", "state"]
        expected = stacked(source, "actions", ("demo_2",)).astype(np.float32)
        np.testing.assert_array_equal(buffer["action"][:], expected)
        assert buffer.attrs["masks"] == {"train": [], "valid": [0]}
        assert report.masks == {"train": 0, "valid": 1}

    def test_images_stay_images(self, source: Path, tmp_path: Path):
        rng = np.random.default_rng(0)

        def add(file: Any) -> None:
            for name in file["data"]:
                length = len(file[f"data/{name}/actions"])
                image = rng.integers(0, 256, (length, 6, 6, 3), dtype=np.uint8)
                file[f"data/{name}/obs/agentview_image"] = image

        edit(source, add)
        convert(source, tmp_path / "x.zarr", keys=["agentview_image", "object"])
        stored = ReplayBuffer.open(tmp_path / "x.zarr")["agentview_image"]
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored[:], stacked(source, "obs/agentview_image"))

    def test_without_states_and_scenes(self, source: Path, tmp_path: Path):
        def strip(file: Any) -> None:
            for name in file["data"]:
                del file[f"data/{name}/states"], file[f"data/{name}"].attrs["model_file"]

        convert(edit(source, strip), tmp_path / "x.zarr")
        assert "state" not in ReplayBuffer.open(tmp_path / "x.zarr")
        assert read_scenes(tmp_path / "x.zarr", 3) is None

    def test_two_arms(self, tmp_path: Path, write_robomimic: Write):
        source = write_robomimic(tmp_path / "t.hdf5", task="transport")
        report = convert(source, tmp_path / "x.zarr")
        buffer = ReplayBuffer.open(tmp_path / "x.zarr")
        assert report.task == "transport"
        assert buffer["action"].shape == (12, 14)
        expected = canonical_quat(stacked(source, "obs/robot1_eef_quat")).astype(np.float32)
        np.testing.assert_array_equal(buffer["robot1_eef_quat"][:], expected)

    def test_training_loads_it(self, source: Path, tmp_path: Path):
        convert(source, tmp_path / "x.zarr.zip")
        loaded = load_demonstrations(tmp_path / "x.zarr.zip", OBS)
        assert loaded.action.shape == (12, 7)
        assert {key: value.shape for key, value in loaded.obs.items()} == {
            "object": (12, 10),
            "robot0_eef_pos": (12, 3),
            "robot0_eef_quat": (12, 4),
            "robot0_gripper_qpos": (12, 2),
        }
        assert read_scenes(tmp_path / "x.zarr.zip", 3) is not None

    def test_old_controller_settings_are_translated(self, source: Path, tmp_path: Path):
        def old(args: dict[str, Any]) -> None:
            args["env_version"] = "1.4.1"
            del args["env_kwargs"]["lite_physics"]
            args["env_kwargs"]["controller_configs"] = {
                "type": "OSC_POSE",
                "control_delta": True,
                "damping": 1,
                "kp": 150,
            }

        convert(set_env(source, old), tmp_path / "x.zarr")
        kwargs = json.loads(ReplayBuffer.open(tmp_path / "x.zarr").attrs["env_args"])["env_kwargs"]
        assert kwargs["controller_configs"]["body_parts"]["right"]["input_type"] == "delta"
        assert kwargs["lite_physics"] is False


class TestGoalsOfTheFile:
    @pytest.fixture
    def with_goals(self, source: Path) -> Path:
        rng = np.random.default_rng(1)

        def add(file: Any) -> None:
            for name in file["data"]:
                actions = file[f"data/{name}/actions"][()]
                goals = np.concatenate([rng.normal(size=(len(actions), 6)), actions[:, 6:]], 1)
                file[f"data/{name}/actions_abs"] = goals

        return edit(source, add)

    def check(self, out: Path, goals: Any) -> None:
        stored = ReplayBuffer.open(out)["action"][:]
        assert stored.shape == (12, 10)
        np.testing.assert_allclose(stored[:, :3], goals[:, :3], atol=1e-6)
        np.testing.assert_allclose(
            rot6d_to_matrix(stored[:, 3:9]), axis_angle_to_matrix(goals[:, 3:6]), atol=1e-6
        )
        np.testing.assert_array_equal(stored[:, 9], goals[:, 6].astype(np.float32))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_are_used_without_a_simulator(
        self,
        with_goals: Path,
        tmp_path: Path,
        workers: int,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setitem(sys.modules, "robosuite", None)
        report = convert(with_goals, tmp_path / "x.zarr", actions="absolute", workers=workers)
        assert report.goals_from_file == 3
        self.check(tmp_path / "x.zarr", stacked(with_goals, "actions_abs"))
        assert ReplayBuffer.open(tmp_path / "x.zarr").attrs["actions"] == "absolute"

    def test_a_file_recorded_with_absolute_actions(self, with_goals: Path, tmp_path: Path):
        def move(file: Any) -> None:
            for name in file["data"]:
                del file[f"data/{name}/actions"]
                file.move(f"data/{name}/actions_abs", f"data/{name}/actions")

        set_env(edit(with_goals, move), lambda args: arm(args).update(input_type="absolute"))
        with pytest.raises(RobomimicFileError, match=r"are absolute.*Use actions=absolute"):
            convert(with_goals, tmp_path / "x.zarr")
        report = convert(with_goals, tmp_path / "x.zarr", actions="absolute")
        assert report.goals_from_file == 0
        self.check(tmp_path / "x.zarr", stacked(with_goals, "actions"))
        set_env(with_goals, lambda args: arm(args).update(input_ref_frame="base"))
        with pytest.raises(RobomimicFileError, match="in the frame of the robot's base"):
            convert(with_goals, tmp_path / "y.zarr", actions="absolute")


def test_absolute_actions_of_two_arms():
    goals = np.arange(2 * 14, dtype=np.float64).reshape(2, 14) / 20
    actions = absolute_actions(goals)
    assert actions.shape == (2, 20)
    for start, column in ((0, 0), (7, 10)):
        np.testing.assert_array_equal(actions[:, column : column + 3], goals[:, start : start + 3])
        np.testing.assert_array_equal(actions[:, column + 9], goals[:, start + 6])
    assert absolute_actions(np.zeros((0, 14))).shape == (0, 20)


class TestAtomic:
    """Whatever goes wrong, a store that was there is what it was, and nothing is left over."""

    @pytest.fixture
    def store(self, source: Path, tmp_path: Path) -> Path:
        convert(source, tmp_path / "x.zarr")
        return tmp_path / "x.zarr"

    def test_a_failing_conversion_leaves_the_old_store(self, source: Path, store: Path):
        before = listing(store)

        def spoil(file: Any) -> None:
            file["data/demo_2/actions"][1, 1] = np.nan  # the last one: two were written by then

        with pytest.raises(RobomimicFileError, match="demo_2"):
            convert(edit(source, spoil), store)
        assert listing(store) == before
        assert sorted(path.name for path in store.parent.iterdir()) == ["demos.hdf5", "x.zarr"]

    def test_a_failing_rename_brings_it_back(
        self, source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
    ):
        before, rename = listing(store), Path.rename

        def fail_once(self: Path, target: Path) -> Path:
            if self.name == "store.zarr":
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_once)
        with pytest.raises(OSError, match="No space left"):
            convert(source, store, filter_key="valid")
        assert listing(store) == before
        assert sorted(path.name for path in store.parent.iterdir()) == ["demos.hdf5", "x.zarr"]

    def test_an_interrupt_leaves_nothing(self, source: Path, tmp_path: Path):
        def stop(done: int, _: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "x.zarr", progress=stop)
        assert [path.name for path in tmp_path.iterdir()] == ["demos.hdf5"]

    @pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
    def test_a_converted_store_is_replaced(self, source: Path, tmp_path: Path, name: str):
        for filter_key, episodes in (("train", 2), ("valid", 1)):
            convert(source, tmp_path / name, filter_key=filter_key)
            assert ReplayBuffer.open(tmp_path / name).n_episodes == episodes
        assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.hdf5", name]

    def test_anything_else_is_not(self, source: Path, tmp_path: Path):
        ReplayBuffer.create(tmp_path / "x.zarr").append_episode({"action": np.ones((3, 2))})
        (tmp_path / "y.zarr").mkdir()
        (tmp_path / "z.zip").write_text("mine")
        before = listing(tmp_path)
        for name in ("x.zarr", "y.zarr", "z.zip"):
            with pytest.raises(
                FileExistsError, match="it is not known that `cmpolicy data convert"
            ):
                convert(source, tmp_path / name)
        assert listing(tmp_path) == before

    def test_episodes_that_do_not_fit(self, tmp_path: Path):
        def episodes() -> Any:
            for width in (3, 4):
                obs = {"object": np.ones((5, width))}
                yield writing.ConvertedEpisode(obs, np.ones((5, 7)), None, None)

        with pytest.raises(ValueError, match="shape"):
            writing.write_store(tmp_path / "x.zarr", "test", episodes(), {})
        assert list(tmp_path.iterdir()) == []


def _no_states(file: Any) -> None:
    for name in file["data"]:
        del file[f"data/{name}/states"]


def _actions(width: int) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.zeros((3, width))

    return change


def _wide_obs(file: Any) -> None:
    del file["data/demo_2/obs/object"]
    file["data/demo_2/obs/object"] = np.zeros((4, 11))


def _obs_named_state(file: Any) -> None:
    for name in file["data"]:
        file[f"data/{name}/obs/state"] = file[f"data/{name}/obs/object"][()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_actions(8), r"demo_1: actions have 8 columns; lift under OSC_POSE takes 7"),
        (_actions(14), r"demo_1: actions have 14 columns"),
        (_wide_obs, r"demo_2: has .*\(11,\).* but demo_0 has .*\(10,\)"),
        (_obs_named_state, r"the observation 'state' has the name of an array that every store"),
        (lambda f: f["mask"].create_dataset("none", data=np.array([], "S6")), None),
    ],
)
def test_bad_files(
    source: Path, tmp_path: Path, change: Callable[[Any], object], message: str | None
):
    edit(source, change)
    with pytest.raises(RobomimicFileError, match=message or "the filter 'none' is empty") as caught:
        convert(source, tmp_path / "x.zarr", filter_key=None if message else "none")
    assert str(source) in str(caught.value)


def test_absolute_actions_need_states(source: Path, tmp_path: Path):
    edit(source, _no_states)
    with pytest.raises(RobomimicFileError, match=r"demo_0 has no states.*Use actions=delta"):
        convert(source, tmp_path / "x.zarr", actions="absolute")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(env_name="Door"), RecordedEnvError, r"'Door', .*Lift \(lift\)"),
        (lambda a: a["env_kwargs"].update(robots=["Sawyer"]), EnvArgsError, r"Sawyer.*'Panda'"),
        (
            lambda a: a["env_kwargs"].update(robots=["Panda", "Panda"]),
            RecordedEnvError,
            r"env_kwargs.robots is \['Panda', 'Panda'\]; Lift has 1",
        ),
        (lambda a: arm(a).update(type="JOINT_VELOCITY"), EnvArgsError, r"JOINT_VELOCITY.*OSC_POSE"),
        (lambda a: a.update(type=2), EnvArgsError, "another simulator"),
    ],
)
def test_other_robots_controllers_and_simulators(
    source: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    error: type[Exception],
    message: str,
):
    with pytest.raises(error, match=message) as caught:
        convert(set_env(source, change), tmp_path / "x.zarr")
    assert str(source) in str(caught.value)


def test_bad_arguments(source: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"actions must be delta or absolute, got 'velocity'"):
        convert(source, tmp_path / "x.zarr", actions="velocity")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        convert(source, tmp_path / "x.zarr", workers=0)
    with pytest.raises(ValueError, match=r"ending in \.zarr"):
        convert(source, tmp_path / "x.hdf5")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert(source, tmp_path / "no" / "x.zarr")
    with pytest.raises(RobomimicFileError, match=r"no observation 'pose' \(keys: object, robot0"):
        convert(source, tmp_path / "x.zarr", keys=["pose"])


def test_scenes_are_checked(source: Path, tmp_path: Path):
    convert(source, tmp_path / "x.zarr")
    with pytest.raises(ValueError, match="scenes of 3 episodes, but has 4"):
        read_scenes(tmp_path / "x.zarr", 4)
    (tmp_path / "x.zarr" / "meta" / "scene_xml" / "c" / "0").unlink()
    with pytest.raises(ValueError, match="scene_xml are not there"):
        read_scenes(tmp_path / "x.zarr", 3)


def test_robosuite_is_not_installed(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    out = tmp_path / "x.zarr"
    with pytest.raises(ImportError, match=r"robosuite, .*pip install 'cmpolicy\[robomimic\]'"):
        convert(source, out, actions="absolute")
    assert main(["convert", "robomimic", str(source), f"out={out}", "actions=absolute"]) == 2
    assert "pip install 'cmpolicy[robomimic]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["demos.hdf5"]
    convert(source, out)  # delta actions need none
    assert ReplayBuffer.open(out).n_episodes == 3


def test_inspect_shows_a_converted_store(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    convert(source, tmp_path / "x.zarr")
    assert main(["inspect", str(tmp_path / "x.zarr")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  masks: {'train': [0, 1], 'valid': [2]}" in lines
    (shown,) = (line for line in lines if line.startswith("  env_args: "))
    assert shown.startswith('  env_args: { "env_name": "Lift", ')
    assert shown.endswith(" characters)")
    assert max(map(len, lines)) < 160


def test_the_command_says_what_it_leaves_out_and_how_to_train_on_the_rest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def add(file: Any) -> None:
        for name in file["data"]:
            length = len(file[f"data/{name}/actions"])
            file[f"data/{name}/obs/agentview_image"] = np.zeros((length, 6, 6, 3), np.uint8)

    def printed(*words: str) -> str:
        assert main(["convert", "robomimic", str(source), f"out={tmp_path}/x.zarr", *words]) == 0
        return capsys.readouterr().out

    edit(source, add)
    assert "names what is taken): agentview_image\n" in printed()
    assert "cmpolicy train task=lift data=robomimic" in printed()
    told = printed("obs=[agentview_image,robot0_eef_pos]")
    assert "taken): object, robot0_eef_quat, robot0_gripper_qpos\n" in told
    assert "encoder=compact 'data.obs=[agentview_image,robot0_eef_pos]'" in told
    assert "task=lift 'data.obs=[robot0_eef_pos]' data=robomimic" in printed("obs=[robot0_eef_pos]")
