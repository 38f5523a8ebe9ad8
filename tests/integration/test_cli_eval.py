"""``cmpolicy eval`` from end to end with a tiny real policy, and every way to get it wrong."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmpolicy
from cmpolicy.cli.main import main as command
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec
from cmpolicy_data import ReplayBuffer, bundled_path
from cmpolicy_envs.pusht import PushTEnv
from cmpolicy_eval import get_protocol, rollout
from cmpolicy_eval.result import Result


def main(words: Sequence[str]) -> int:
    """``cmpolicy eval``."""
    return command(["eval", *words])


NET = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)


def save_policy(
    folder: Path,
    obs: dict[str, tuple[int, ...]],
    action_dim: int = 2,
    data: str = "pusht_human",
    protocol: str | None = "pusht-dp",
) -> Path:
    spec = PolicySpec(obs, action_dim, horizon=16, n_obs_steps=2, n_action_steps=8)
    shapes = {**obs, "action": (action_dim,)}
    arrays = {k: np.stack([np.zeros(s), np.full(s, 512.0)]) for k, s in shapes.items()}
    normalizer = Normalizer.fit({k: v.astype(np.float32) for k, v in arrays.items()})
    metadata = {"data": data, "config": {"task": {"protocol": protocol}}}
    ConsistencyPolicy(spec, NET, normalizer).save_pretrained(folder, metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    return save_policy(folder, {"agent_pos": (2,), "keypoint": (9, 2)})


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a call that must fail as a user's error, without traceback."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cmpolicy eval: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def scored(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    status = main(
        [
            f"policy={bundle}",
            "name=tiny",
            "protocol=pusht-gym",
            "seeds=100000-100002",
            "nfe=[1,2]",
            "batch_size=3",
            "workers=2",
            "device=cpu",
            f"out={out}",
        ]
    )
    assert status == 0
    return out


def test_results_and_report_are_written(scored: Path) -> None:
    assert {p.name for p in scored.iterdir()} == {
        "result_nfe1.json",
        "result_nfe2.json",
        "report.md",
        "report.png",
    }
    result = Result.load(scored / "result_nfe2.json")
    assert (result.policy, result.protocol, result.nfe) == ("tiny", "pusht-gym", 2)
    assert result.seeds == (100_000, 100_001, 100_002)
    assert (result.device, result.data) == ("cpu", "pusht_human")
    assert result.command.startswith("cmpolicy eval policy=")
    assert {e.length for e in result.episodes} <= set(range(1, 301))
    raw = json.loads((scored / "result_nfe1.json").read_text())
    assert raw["infer_ms"]["batch_size"] == 3


def test_another_result_is_put_aside_and_the_same_one_replaced(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"policy={bundle}", "nfe=1", "workers=1", f"out={tmp_path}"]
    for seed, name in ((100_000, "first"), (100_000, "again"), (100_001, "other")):
        assert main([*words, f"seeds={seed}", f"name={name}"]) == 0
    assert "held another result" in capsys.readouterr().err
    assert Result.load(tmp_path / "result_nfe1.json").policy == "other"
    assert Result.load(tmp_path / "result_nfe1-before-1.json").policy == "again"
    assert not (tmp_path / "result_nfe1-before-2.json").exists()


def test_a_simulator_without_pictures_is_scored_all_the_same(bundle: Path, tmp_path: Path) -> None:
    class Blind(PushTEnv):
        def render(self) -> Any:
            raise NotImplementedError

    protocol = dataclasses.replace(get_protocol("pusht-dp"), make_env=Blind)
    with pytest.warns(UserWarning, match=r"no videos of .*: its environment has no render\(\)"):
        result = cmpolicy.evaluate(
            str(bundle), protocol=protocol, seeds=[500_000], videos=1, out=tmp_path, workers=1
        )
    assert Result.load(tmp_path / "result_nfe1.json").episodes == result.episodes
    assert (tmp_path / "report.md").is_file()


def test_reports_are_made_from_result_files(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"results=[{scored / 'result_nfe1.json'},{scored / 'result_nfe2.json'}]"
    assert main(["report", files, f"out={tmp_path / 'r'}"]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in table[:3]}) == 1
    assert "tiny, 2 evaluations" in printed
    assert (tmp_path / "r" / "report.md").is_file()


def test_another_sampler_is_said_in_the_name_and_videos_are_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    words = ["policy=tiny", "seeds=100000", "nfe=1", "sampler=diagonal", "videos=1", "workers=1"]
    assert main([*words, "batch_size=1", f"out={tmp_path}"]) == 0
    assert Result.load(tmp_path / "result_nfe1.json").policy == "tiny [diagonal]"
    names = {p.name for p in (tmp_path / "videos").iterdir()}
    assert names == {"seed_100000_nfe1.mp4", "grid_nfe1.gif"}


def test_a_time_floor_is_said_in_the_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    words = ["policy=tiny", "seeds=100000", "nfe=2", "sampler=diagonal", "workers=1"]
    assert main([*words, "batch_size=1", "time_floor=0.15", f"out={tmp_path}"]) == 0
    label = Result.load(tmp_path / "result_nfe2.json").policy
    assert label == "tiny [diagonal] [floor 0.15]"


@pytest.mark.filterwarnings("default::cmpolicy_eval.seeds.SeedOverlapWarning")
@pytest.mark.parametrize("data", ["pusht_human", "pusht_scripted"])
def test_training_seeds_are_warned_of(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = 205
    if data == "pusht_scripted":
        seed = ReplayBuffer.open(bundled_path("pusht")).attrs["seeds"][-1]
    policy = save_policy(tmp_path / "policy", {"agent_pos": (2,)}, data=data)
    words = [f"policy={policy}", f"seeds={seed}", "workers=1", "batch_size=1"]
    assert main([*words, f"out={tmp_path}"]) == 0
    source = {"pusht_human": "the public human demonstrations"}.get(data, data)
    expected = f"1 of 1 evaluation seeds ({seed}) are training seeds of {source}"
    assert expected in capsys.readouterr().err


def test_an_episode_does_not_depend_on_the_other_seeds(bundle: Path) -> None:
    policy = ConsistencyPolicy.from_pretrained(bundle)
    protocol = get_protocol("pusht-dp")

    def chunks(seeds: list[int], seed: int) -> np.ndarray:
        results = rollout(
            protocol.make_env,
            policy,
            seeds,
            max_steps=24,
            reset_options=protocol.reset_options,
            n_workers=1,
            batch_size=3,
            keep_chunks=9,
        )
        kept = next(result.chunks for result in results if result.seed == seed)
        assert kept is not None
        return kept

    alone = chunks([100_002], 100_002)
    together = chunks([100_000, 100_001, 100_003, 100_002, 100_004], 100_002)
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert np.abs(alone - chunks([100_003], 100_003)).max() > 1.0


def test_help_shows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "protocol=" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sede=1", "unknown setting 'sede'; did you mean 'seeds'?"),
        ("fast", "'fast' is not a setting; settings are given as key=value"),
        ("seeds=9-3", "'9-3' ends before it begins"),
        ("seeds=some", "cannot read 'some'"),
        ("nfe=[0]", "nfe=0 must be at least 1"),
        ("nfe=[1,1]", "nfe=[1, 1] must name something, and nothing twice"),
        ("nfe=[1", "cannot read 'nfe=[1': quote values"),
        ("nfe=many", "nfe must be a list such as [1, 2], got 'many'"),
        ("protocol=pusht", "unknown protocol 'pusht'"),
        ("task=lift", "protocol 'pusht-dp' is one task; it takes no task=lift"),
        ("env_args=lift.hdf5", "env_args=lift.hdf5 is of robomimic-ph and robomimic-ph-image; "),
        ("protocol=robomimic-ph", "robomimic-ph needs a task: task=lift | can | square"),
        ("sampler=euler", "sampler='euler' is not one of flow_map, diagonal"),
        (
            "time_floor=0.1",
            "cannot stop at the floor 0.1; give at least 2 evaluations",
        ),
        ("workers=0", "workers=0 must be at least 1"),
        ("videos=-1", "videos=-1 must be at least 0"),
        ("device=tpu", "device='tpu' is not one of auto, cpu, cuda"),
    ],
)
def test_bad_settings(
    bundle: Path, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, f"policy={bundle}", word)


def test_a_policy_that_names_no_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = save_policy(tmp_path / "bare", {"agent_pos": (2,)}, protocol=None)
    assert "give protocol=<name>, one of pusht-dp, pusht-gym" in fails(capsys, f"policy={policy}")


def test_no_policy_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "setting 'policy' is missing" in fails(capsys, "seeds=1")


def test_no_such_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "nothing"
    assert str(place) in fails(capsys, f"policy={place}")


def test_a_policy_of_another_task_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = save_policy(tmp_path / "state", {"state": (5,)})
    message = fails(capsys, f"policy={state}", "seeds=100000")
    assert "observes {state: (5,)}" in message
    assert "gives {agent_pos: (2,), keypoint: (9, 2)}" in message

    corners = save_policy(tmp_path / "corners", {"agent_pos": (2,), "keypoint": (8, 2)})
    message = fails(capsys, f"policy={corners}", "seeds=100000")
    assert "keypoint: (8, 2)" in message
    assert "keypoint: (9, 2)" in message

    arm = save_policy(tmp_path / "arm", {"agent_pos": (2,)}, action_dim=7)
    message = fails(capsys, f"policy={arm}", "seeds=100000")
    assert "actions of 7 numbers" in message
    assert "shape (2,)" in message


def test_reports_of_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "results is empty" in fails(capsys, "report", "results=[]")
    assert "'results' is missing" in fails(capsys, "report")
    assert "none.json does not exist" in fails(
        capsys, "report", f"results=[{tmp_path / 'none.json'}]"
    )
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert f"{broken} is not valid JSON" in fails(capsys, "report", f"results=[{broken}]")
    assert "unknown setting 'result'; did you mean 'results'?" in fails(
        capsys, "report", "result=1"
    )
