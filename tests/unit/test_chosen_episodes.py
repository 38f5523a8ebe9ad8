"""Which episodes are trained on, and how often: ``data.episodes`` and ``data.weights``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import cmpolicy
from cmpolicy.experiment.data import TrainingData, load_training_data
from cmpolicy.experiment.data_checks import check_same_data
from cmpolicy.schema import ConfigError
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.chunks import ReplayBufferError

E = 8


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "s.zarr", attrs={"masks": {"better": [2, 3, 6, 7]}})
    for number in range(E):
        steps = np.random.default_rng(number).uniform(number, number + 1, (20, 2))
        buffer.append_episode({"state": steps, "action": steps})
    root = zarr.open_group(buffer.path, mode="r+")
    for name, values in (
        ("success", np.arange(E) % 2 == 0),
        ("times", np.array([0, 1, 2, 3, 1, 1, 1, 1])),
        ("half", np.full(E, 0.5)),
        ("short", np.ones(3)),
    ):
        array = root.create_array(f"meta/{name}", shape=values.shape, dtype=values.dtype)
        array[...] = values
    return buffer.path


def load(store: Path, **data: Any) -> TrainingData:
    words = [f"data.path={store}", "data.obs=[state]", "control_hz=10", "task=custom"]
    words += [f"data.{key}={value}" for key, value in data.items()]
    return load_training_data(cmpolicy.compose(*words))


@pytest.mark.parametrize(
    ("episodes", "expected"),
    [("null", range(E)), ("success", [0, 2, 4, 6]), ("better", [2, 3, 6, 7]), ("[1,5]", [1, 5])],
)
def test_what_is_trained_on_and_held_out(store: Path, episodes: str, expected: Any) -> None:
    data = load(store, episodes=episodes, val_fraction=0.25)
    assert data.arrays.source_episode.tolist() == list(expected)
    both = np.sort(np.concatenate([data.split.train_ids, data.split.val_ids]))
    assert both.tolist() == list(range(len(expected)))
    assert len(data.split.val_ids) == max(1, len(expected) // 4)
    low, high = data.normalizer().limits("action")
    train = data.arrays.source_episode[data.split.train_ids]
    assert train.min() <= low.min()
    assert high.max() <= train.max() + 1


def test_weights_repeat_windows(store: Path) -> None:
    data = load(store, weights="times", val_fraction=0)
    loader = data.loader(batch_size=4, seed=0, device=torch.device("cpu"))
    assert loader is not None
    once = load(store, val_fraction=0).windows
    per_episode = len(once) // E
    assert loader.n_windows == per_episode * 10
    rows = loader.gather(torch.arange(loader.n_windows))["action"][:, 0, 0]
    counts = np.bincount(rows.floor().long().numpy(), minlength=E)
    assert (counts // per_episode).tolist() == [0, 1, 2, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ({"episodes": "[8]"}, ConfigError, r"data\.episodes=\[8\]: .* has 0 to 7"),
        ({"episodes": "[99999999999999999999999]"}, ConfigError, "has 0 to 7"),
        ({"episodes": "[]"}, ConfigError, "names no episode"),
        ({"episodes": "1.5"}, ConfigError, "must be a list of episode numbers or a name"),
        ({"episodes": "good"}, ReplayBufferError, r"'good'.*there are: better, half, short, succ"),
        ({"episodes": "short"}, ReplayBufferError, r"expected one number per episode, \(8,\)"),
        ({"weights": "half"}, ConfigError, "must hold whole numbers from 0 on"),
    ],
)
def test_what_cannot_be(
    store: Path, setting: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(store, **setting)


def test_what_is_left_out_may_be_broken(store: Path) -> None:
    """That may be why; and what is said of the data is said of what is trained on."""
    buffer = ReplayBuffer.open(store, "r+")
    state = np.linspace(0, 1, 400)[:, None].repeat(2, 1)
    state[100] = np.nan
    buffer.append_episode({"state": state, "action": state})
    with pytest.raises(
        ConfigError, match="NaN or inf at 1 steps, the first is step 100 of episode 8"
    ):
        load(store)
    data = load(store, episodes="better", val_fraction=0.25)
    assert "4 episodes (data.episodes: 4 of 9), 1 of them held out" in data.summary
    assert "of 80 steps" in data.summary


def test_episodes_that_nobody_judged(store: Path) -> None:
    array = zarr.open_group(store, mode="r+").create_array(
        "meta/judged", shape=(E,), dtype="float32"
    )
    array[...] = [1, 0, np.nan, 1, 1, 0, np.nan, 1]
    with pytest.raises(
        ReplayBufferError, match=r"meta/judged holds nan for episode 2 \(and 1 more"
    ):
        load(store, episodes="judged")


@pytest.mark.parametrize("mask", [[True, False] * 4, [1.0, 2.0], [7, 8], "better"])
def test_a_mask_that_does_not_number_episodes(store: Path, mask: Any) -> None:
    """True and false would be taken for the episodes 1 and 0."""
    ReplayBuffer.open(store, "r+").update_attrs({"masks": {"mine": mask}})
    with pytest.raises(ReplayBufferError, match="'mine' must be a list of episode numbers from 0"):
        load(store, episodes="mine")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"episodes": "success"}, "episode 1 of those that are used is another one"),
        ({"weights": "times"}, r"data\.episodes or data\.weights choose other episodes"),
    ],
)
def test_a_run_does_not_go_on_with_other_episodes_of_its_data(
    store: Path, setting: dict[str, str], words: str
) -> None:
    before = load(store, **setting).facts
    (name,) = setting.values()
    array = zarr.open_group(store, mode="r+")[f"meta/{name}"]
    assert isinstance(array, zarr.Array)

    def compare(facts: dict[str, Any]) -> None:
        data = load(store, **setting).with_held_out_of(facts, 0.02, 0)
        check_same_data(facts, data.facts, Path("run"))

    compare(before)
    array[...] = 1
    with pytest.raises(ConfigError, match=words):
        compare(before)


def test_a_run_that_noted_all_episodes_goes_on_with_those_it_uses(store: Path) -> None:
    """So were runs begun once: they noted also those that ``data.episodes`` leaves out."""
    whole, chosen = load(store), load(store, episodes="better", val_fraction=0.25)
    numbers = {
        f"{name}_episodes": chosen.arrays.source_episode[ids].tolist()
        for name, ids in (("train", chosen.split.train_ids), ("val", chosen.split.val_ids))
    }
    before = whole.facts | numbers
    again = load(store, episodes="better", val_fraction=0.25).with_held_out_of(before, 0.25, 7)
    assert again.split.val_ids.tolist() == chosen.split.val_ids.tolist()
    check_same_data(before, again.facts, Path("run"))
    other = load(store, episodes="[2,3,6]").with_held_out_of(before, 0.25, 7)
    with pytest.raises(ConfigError, match="it had 4 episodes, it has 3"):
        check_same_data(before, other.facts, Path("run"))


def test_a_run_of_before_keeps_its_best_policy(store: Path, tmp_path: Path) -> None:
    """Where the episodes are those that it used, whatever else it noted."""
    words = [f"data.path={store}", "data.obs=[state]", "control_hz=10", "task=custom"]
    words += ["data.episodes=better", "data.val_fraction=0.25", "net=tiny", "batch_size=8"]
    config = cmpolicy.compose(*words, "examples=32", "eval.every=16", "optim.warmup=0")
    run = cmpolicy.train(config, tmp_path / "run", until=16)
    facts = json.loads((run.run_dir / "facts.json").read_text())
    whole = load(store).fingerprint
    number = {each: i for i, each in enumerate(whole["episodes"])}
    for name in ("train_episodes", "val_episodes"):
        facts[name] = [number[facts["data"]["episodes"][i]] for i in facts[name]]
    (run.run_dir / "facts.json").write_text(json.dumps(facts | {"data": whole}))
    assert run.end.best is not None
    again = cmpolicy.resume(run.run_dir, {"optim.lr": 1.0})  # what follows is worse
    assert again.end.best == run.end.best


def test_an_episode_that_is_there_twice(store: Path) -> None:
    """One copy is held out, the other trains; it stays so when others are added."""
    buffer = ReplayBuffer.open(store, "r+")
    arrays = {key: buffer.load(key) for key in ("state", "action")}
    for number in range(E):
        rows = slice(20 * number, 20 * number + 20)
        buffer.append_episode({key: value[rows] for key, value in arrays.items()})
    before = load(store, val_fraction=0.25)
    new = np.random.default_rng(99).uniform(0, 1, (20, 2))
    buffer.append_episode({"state": new, "action": new})
    after = load(store, val_fraction=0.25).with_held_out_of(before.facts, 0.25, 0)
    assert after.split.val_ids.tolist() == before.split.val_ids.tolist()
    assert after.split.train_ids.tolist() == [*before.split.train_ids, 2 * E]


def test_weights_that_leave_nothing_of_what_is_chosen(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"meta/times .* is 0 for all episodes that data\.episo"):
        load(store, weights="times", episodes="[0]", val_fraction=0)


def test_a_nan_beside_a_pause(store: Path) -> None:
    """Steps are those of the store, of which pauses are part."""
    steps = np.random.default_rng(9).uniform(0, 1, (60, 2))
    steps[20:40] = steps[20]
    steps[50] = np.nan
    ReplayBuffer.open(store, "r+").append_episode({"state": steps, "action": steps})
    with pytest.raises(ConfigError, match="the first is step 50 of episode 8"):
        load(store, max_pause=3)


def test_rotations_that_the_store_names_are_those_of_its_actions(store: Path) -> None:
    buffer = ReplayBuffer.open(store)
    mine = ReplayBuffer.create(
        store.parent / "r.zarr", attrs={"action_rotations": ["quaternion:0,1,2,3"]}
    )
    for number in range(E):
        steps = buffer.load("state")[20 * number : 20 * number + 20].repeat(2, 1)
        mine.append_episode({"state": steps, "action": steps, "joints": steps})
    rotations = load(mine.path).rotations
    assert rotations is not None
    assert rotations[0].dims == (0, 1, 2, 3)
    assert load(mine.path, action="joints").rotations is None
    assert load(mine.path, action="'action[1:]'").rotations is None


def test_keys_with_dots_are_scaled_by_name(store: Path) -> None:
    buffer = ReplayBuffer.open(store)
    mine = ReplayBuffer.create(store.parent / "d.zarr")
    steps = buffer.load("state")
    mine.append_episode({"observation.state": steps, "action": steps})
    words = ["task=custom", f"data.path={mine.path}", "data.obs=[observation.state]"]
    words += ["control_hz=10", "data.normalize.observation.state=minmax"]
    assert cmpolicy.compose(*words).data.normalize["observation.state"] == "minmax"
