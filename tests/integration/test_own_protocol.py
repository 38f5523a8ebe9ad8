"""The example of eval/README.md: a simulator and a protocol of one's own, trained and scored."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cmpolicy import ConsistencyPolicy
from cmpolicy.cli.main import main
from cmpolicy_eval.result import Result

README = (Path(__file__).resolve().parents[2] / "eval/README.md").read_text()
README = README.partition("## A simulator of your own")[2]
TRAIN = "net.down_dims=[8,16] examples=64 batch_size=16 optim.warmup=0 device=cpu eval.windows=8"
ROLLOUTS = "eval.episodes=2 eval.workers=1 log.trackers=[]"
SHORT = {
    "train": f"{TRAIN} {ROLLOUTS}".split(),
    "eval": ["seeds=1000-1001", "workers=1"],
}


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    Path("reach.py").write_text(code)
    (commands,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    first, *rest = [shlex.split(line) for line in commands.splitlines()]
    assert first == ["python", "reach.py"]
    subprocess.run([sys.executable, "reach.py"], check=True)
    for _, verb, *words in rest:
        given = [w for w in words if w.partition("=")[0] not in ("examples", "seeds")]
        assert main([verb, *given, *SHORT[verb]]) == 0
    result = Result.load("outputs/reach-eval/result_nfe1.json")
    assert result.protocol == "reach"
    assert [episode.seed for episode in result.episodes] == [1000, 1001]


def _own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str) -> list[str]:
    """The README's task in a module of its own, with a fault put into its simulator."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    Path(f"{name}.py").write_text(code)
    subprocess.run([sys.executable, f"{name}.py"], check=True)
    assert "def step(self, action):\n" in code
    broken = code.replace(
        "def step(self, action):\n", f"def step(self, action):\n        {fault}\n"
    )
    Path(f"{name}.py").write_text(broken)
    (commands,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    words = next(shlex.split(line) for line in commands.splitlines() if "train" in line)[2:]
    given = [w for w in words if w.partition("=")[0] not in ("examples", "out")]
    return ["train", *(w.replace("reach:", f"{name}:") for w in given), *SHORT["train"]]


def test_a_broken_simulator_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _own_task(tmp_path, monkeypatch, "reach_broken", "raise OSError('no such motor')")
    assert main([*words, "out=run"]) == 1
    message = capsys.readouterr().err
    assert "the environment raised OSError: no such motor" in message
    assert "eval.episodes=0 trains without rollouts" in message
    assert not Path("run/training_state").exists()
    assert main([*words, "out=run", "eval.episodes=0"]) == 0


def test_a_policy_is_saved_before_its_evaluation_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = "self.many = getattr(self, 'many', 0) + 1; assert self.many < 3, 'worn out'"
    words = _own_task(tmp_path, monkeypatch, "reach_worn", fault)
    assert main([*words, "out=run"]) == 1
    message = capsys.readouterr().err
    assert "AssertionError: worn out" in message
    assert "the state of example 64 is safe; go on with:\n  cmpolicy train resume=run" in message
    ConsistencyPolicy.from_pretrained("run/policy_last")
    healthy = Path("reach_worn.py").read_text().replace(fault, "pass")
    Path("reach_worn.py").write_text(healthy)
    monkeypatch.delitem(sys.modules, "reach_worn")
    assert main(["train", "resume=run"]) == 0  # only the evaluation is made
    assert Path("run/result.json").is_file()
