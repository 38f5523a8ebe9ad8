"""Robomimic tasks from the words to a scored bundle, on synthetic stores of the right shapes."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cmpolicy.cli.main import main as command
from cmpolicy.policy.bundle import read_bundle
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy_data import ReplayBuffer
from cmpolicy_envs.robomimic import RobomimicEnv
from cmpolicy_envs.robomimic_args import default_env_args
from cmpolicy_envs.robomimic_tasks import get_task


def evaluate(words: Sequence[str]) -> int:
    """``cmpolicy eval``."""
    return command(["eval", *words])


def train(words: Sequence[str]) -> int:
    """``cmpolicy train``."""
    return command(["train", *words])


OBJECT = {"lift": 10, "tool_hang": 44, "transport": 41}  # numbers of robosuite's object state
TINY = [
    "net.down_dims=[8,16]",
    "net.n_groups=4",
    "net.time_dim=8",
    "encoder.dim=8",
    "examples=32",
    "batch_size=8",
    "optim.warmup=8",
    "log.trackers=[]",
    "eval.windows=8",
    "device=cpu",
]


def write_store(path: Path, task: str, actions: str = "delta") -> Path:
    rng = np.random.default_rng(0)
    arms = get_task(task).n_arms
    shapes = {"object": OBJECT[task], "action": arms * (7 if actions == "delta" else 10)}
    for arm in range(arms):
        names = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
        shapes |= {f"robot{arm}_{name}": size for name, size in names.items()}
    attrs = {"task": task, "env_args": default_env_args(task).to_json(), "actions": actions}
    buffer = ReplayBuffer.create(path, attrs=attrs)
    for length in (30, 24):
        buffer.append_episode(
            {k: rng.uniform(-0.5, 0.5, (length, n)).astype(np.float32) for k, n in shapes.items()}
        )
    return path


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_lift_is_rolled_out_while_training_and_scored_without_naming_the_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "lift.zarr", "lift")
    rollouts = ["eval.every=32", "eval.episodes=1", "eval.workers=1"]
    assert train(["task=lift", f"data.path={store}", *TINY, *rollouts, "out=run"]) == 0
    simulator = read_bundle("run/policy").metadata["simulator"]
    assert simulator["task"] == "lift"
    assert simulator["actions"] == "delta"
    assert "Lift" in simulator["env_args"]
    result = json.loads(Path("run/result.json").read_text())
    assert result["protocol"] == "robomimic-ph lift"
    assert result["episodes"][0]["seed"] == 500000

    words = ["policy=run/policy", "seeds=500000", "workers=1", "out=scored"]
    assert evaluate(words) == 0
    again = json.loads(Path("scored/result_nfe1.json").read_text())
    assert again["protocol"] == "robomimic-ph lift"
    assert again["episodes"][0]["length"] == result["episodes"][0]["length"]
    assert evaluate([*words, "task=can"]) == 2
    assert "task=can, but the demonstrations are of 'lift'" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "size"), [("tool_hang", 10), ("transport", 20)])
def test_absolute_actions_keep_rotation_and_gripper(tmp_path: Path, task: str, size: int) -> None:
    store = write_store(tmp_path / f"{task}.zarr", task, "absolute")
    words = [f"task={task}", f"data.path={store}", *TINY, "eval.episodes=0", "out=run"]
    assert train(words) == 0
    policy = ConsistencyPolicy.from_pretrained("run/policy")
    assert policy.spec.action_dim == size
    scale = policy.normalizer.to_arrays()["action.scale"].numpy().reshape(-1, 10)
    assert (scale[:, 3:] == 1).all()
    assert (scale[:, :3] > 1.5).all()  # positions from -0.5 to 0.5 m
    assert policy.control_hz == 20.0


def test_the_simulator_takes_what_the_store_says(tmp_path: Path) -> None:
    from cmpolicy.experiment.protocols import Simulator, open_protocol, read_env_args

    store = write_store(tmp_path / "lift.zarr", "lift", "absolute")
    facts = Simulator.from_mapping(ReplayBuffer.open(store).attrs)
    protocol = open_protocol("robomimic-ph", None, facts)
    env = protocol.make_env()
    assert isinstance(env, RobomimicEnv)
    assert env.action_space.shape == (10,)
    env.close()
    assert (protocol.max_steps, protocol.default_seeds) == (400, (100_000, 100_099))
    assert read_env_args(str(store)) == facts.env_args


def test_a_store_of_another_robot_may_call_its_attributes_so(tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "my.zarr", attrs={"actions": "absolute", "task": "x"})
    steps = np.random.default_rng(0).uniform(size=(40, 6)).astype(np.float32)
    for _ in range(2):
        buffer.append_episode({"state": steps, "action": steps})
    words = [
        "task=custom",
        "control_hz=20",
        "data.path=my.zarr",
        "data.obs=[state]",
        *TINY,
        "out=run",
    ]
    assert train(words) == 0
    assert "simulator" not in read_bundle("run/policy").metadata


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=can", "data.path=lift.zarr"], "task=can, but the demonstrations are of 'lift'"),
        (["task=lift", "data=robomimic"], "data=robomimic needs data.path"),
        (["task=lift", "data.path=nowhere.zarr"], "nowhere.zarr"),
        (
            ["task=lift", "data.path=lift.zarr", "eval.first_seed=100050"],
            "takes seeds 100050-",
        ),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "lift.zarr", "lift")
    assert train([*words, *TINY, "eval.episodes=1", "out=run"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()
