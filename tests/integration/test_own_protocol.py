"""The example of eval/README.md: a simulator and a protocol of one's own, trained and scored."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
