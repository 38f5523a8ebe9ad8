"""The text and the facts that a trained policy carries with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import TrainingData
from cmpolicy.experiment.run import RunFolder, read_facts
from cmpolicy.experiment.scoring import PolicyScorer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.training.trainer import Scores
from cmpolicy_eval.evaluate import git_commit, versions

BEST, LAST, RESULT = "policy", "policy_last", "result.json"


class PolicyKeeper:
    """Writes the best policy of a run to ``policy/`` and the latest to ``policy_last/``."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        folder: RunFolder,
        scorer: PolicyScorer,
        *,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._data = data
        self._folder = folder
        self._scorer = scorer
        self._start = start  # metadata of the policy that the run starts from

    def __call__(
        self,
        kind: Literal["best", "last"],
        policy: ConsistencyPolicy,
        examples: int,
        scores: Scores | None,
    ) -> None:
        """Write the bundle, and the result of its rollouts beside it."""
        metrics = dict(scores.metrics) if scores is not None else {}
        config = self._config.to_dict()
        config["data"]["path"] = None  # a folder of this machine
        config["init"] = init_name(config["init"])
        metadata = {
            "task": self._config.task.name,
            "data": self._data.source,
            "command": without_folders(self._folder.command),
            "data_fingerprint": self._data.fingerprint_digest,
            "examples": examples,
            "nfe": policy.nfe,
            "metrics": metrics,
            "versions": versions(),
            "git_commit": git_commit(),
            "config": config,
        }
        if self._data.simulator.to_dict():
            metadata["simulator"] = self._data.simulator.to_dict()
        if self._start is not None:
            metadata["start"] = self._start
        if history := changes_of(self._folder):
            metadata["history"] = history
        folder = self._folder.path / (BEST if kind == "best" else LAST)
        policy.save_pretrained(folder, card=model_card(policy, metadata), metadata=metadata)
        if kind == "best" and self._scorer.result is not None:
            self._scorer.result.save(self._folder.path / RESULT)


_QUOTED_PATH = re.compile(r"'([^'=]*=)?(?:~|\.{0,2})/[^']*?([^'/]*)/?'")
_PATH = re.compile(r"(?<=[=\s\[,])(?:~[^\s/]*|\.{0,2})/(?:[^\s'\",\]]*/)?([^\s/'\",\]]+)/?")


def without_folders(command: str) -> str:
    """A command as others may read it: of paths on this machine only the last part is left."""
    return _PATH.sub(r"\1", _QUOTED_PATH.sub(r"'\1\2'", command))


def init_name(init: str | None) -> str | None:
    """What a run started from, without the folders of this machine."""
    return None if init is None else without_folders(f"init={init}").removeprefix("init=")


def changes_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The changes with which a run went on: from which example on, and by which command."""
    history = read_facts(folder.path).get("history", [])
    return [{**part, "command": without_folders(part["command"])} for part in history]


def origin(init: str | None, metadata: Mapping[str, Any]) -> tuple[str, str]:
    """For a card: what a training started from, and a line for each change and earlier training."""
    lines, start = _changed(metadata), metadata.get("start")
    while start:
        lines += f"- before that: {start.get('examples')} examples, `{start.get('command')}`\n"
        lines += _changed(start)
        start = start.get("start")
    return "from scratch" if init is None else f"further, from `{init}`,", lines


def _changed(metadata: Mapping[str, Any]) -> str:
    return "".join(
        f"- from example {part['examples']} on: `{part['command']}`\n"
        for part in metadata.get("history", [])
    )


def model_card(policy: ConsistencyPolicy, metadata: Mapping[str, Any]) -> str:
    """README.md of a bundle: what it is, how it was made, how it did, how to use it."""
    spec, config = policy.spec, metadata["config"]
    saved = (policy.encoder, policy.flow_map)  # a head of data.targets is of the training alone
    parameters = sum(p.numel() for part in saved for p in part.parameters())
    obs = ", ".join(f"`{key}` {tuple(shape)}" for key, shape in spec.obs.items())
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in metadata["metrics"].items()
    )
    first = config["eval"]["first_seed"]
    note = (
        f"Rollouts on the seeds {first}-{first + config['eval']['episodes'] - 1}, on which this "
        "policy was chosen\namong those of its run; score it on others with `cmpolicy eval`."
        if "success" in metadata["metrics"]
        else "Measured on held-out episodes."
    )
    scores = (
        f"| while training, {metadata['nfe']} evaluation(s) per chunk | |\n|---|---|\n{rows}\n\n"
        f"{note}\n"
        if rows
        else "Not scored while training.\n"
    )
    start, stages = origin(config.get("init"), metadata)
    if targets := config["data"].get("targets"):
        named = ", ".join(f"`{key}`" for key in targets)
        stages += f"- its features learned to tell, and the policy does not see: {named}\n"
    executed = f"executes {spec.n_action_steps}"
    if policy.warm_start is not None:
        executed += (
            f"; decisions but for the first start from the plan before, at {policy.warm_start}"
        )
    return f"""# A cmpolicy policy for {metadata["task"]}

Trained {start} on `{metadata["data"]}` by `{config["objective"]["name"]}`:
{parameters / 1e6:.1f}M parameters, {policy.path_name} path, sampler `{policy.sampler}`.

- observations: {obs}; the last {spec.n_obs_steps} steps
- actions: {spec.action_dim} numbers; predicts {spec.horizon} steps, {executed}
- training examples: {metadata["examples"]}
- command: `{metadata["command"]}`
{stages}
{scores}
```python
from cmpolicy import ConsistencyPolicy

policy = ConsistencyPolicy.from_pretrained("<this folder>")
chunk = policy.predict_action_chunk(obs)  # (B, Ta, A) in env units, nfe={policy.nfe}
```
"""
