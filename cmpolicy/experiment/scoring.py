"""How a policy is scored while it is trained: on held-out windows, and by rollouts."""

from __future__ import annotations

from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import TrainingData
from cmpolicy.experiment.protocols import open_protocol
from cmpolicy.flow.alarm import health_alarm
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError
from cmpolicy.training.trainer import Scores
from cmpolicy.training.validation import Validator
from cmpolicy_eval.evaluate import evaluate
from cmpolicy_eval.protocol import ROBOMIMIC, EvalProtocol
from cmpolicy_eval.result import Result
from cmpolicy_eval.rollout import RolloutError, try_out


class PolicyScorer:
    """Scores the EMA weights; the best policy of a run is the one that ranks highest.

    Rollouts rank by success, then by score; without a simulator the error of the executed actions
    on held-out episodes ranks, at the policy's own number of evaluations. Of equals, and without
    held-out episodes either, the later policy is the better one.

    Attributes:
        result: of the latest rollouts, None without a simulator.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, validator: Validator | None, *, command: str
    ) -> None:
        self.config = config
        self.result: Result | None = None
        self._validator = validator
        self._source = data.source
        self._command = command
        self._protocol: EvalProtocol | None = None
        if config.task.protocol is not None and config.eval.episodes:
            task = config.task.name if config.task.protocol in ROBOMIMIC else None
            self._protocol = open_protocol(config.task.protocol, task, data.simulator)
            check_tuning_seeds(self.seeds, self._protocol)

    @property
    def seeds(self) -> range:
        """Seeds of the rollouts while training."""
        first = self.config.eval.first_seed
        return range(first, first + self.config.eval.episodes)

    def check(self, policy: ConsistencyPolicy) -> None:
        """Refuse a policy that the simulator cannot run, before it is trained for hours.

        The simulator is made, reset, and takes one step: a broken one is found now.

        Raises:
            PolicyMismatchError: observations or actions that differ from the simulator's.
            RolloutError: the simulator fails; eval.episodes=0 trains without it.
        """
        protocol = self._protocol
        if protocol is None:
            return
        seed = self.seeds[0]
        try:
            options = protocol.reset_options(seed)
            timeout = self.config.eval.env_timeout
            try_out(protocol.make_env, policy, seed, options, timeout=timeout)
        except RolloutError as error:
            error.add_note(
                f"this was a trial of the protocol {protocol.name}, before training; "
                "eval.episodes=0 trains without rollouts"
            )
            raise

    def __call__(self, policy: ConsistencyPolicy, examples: int) -> Scores:
        """Score ``policy`` after ``examples`` training examples."""
        metrics: dict[str, float] = {}
        rank: tuple[float, ...] = ()
        if self._validator is not None:
            metrics |= self._validator(policy).metrics
            rank = (-metrics["val_action_error"],)
        if self._protocol is not None:
            self.result = evaluate(
                policy,
                self._protocol,
                self.seeds,
                nfe=policy.nfe,
                policy_name=f"{self.config.task.name} after {examples} examples",
                n_workers=self.config.eval.workers,
                env_timeout=self.config.eval.env_timeout,
                device=policy.device.type,
                data=self._source,
                command=self._command,
            ).result
            rank = (self.result.success_rate, self.result.score_mean)
            metrics |= {"success": rank[0], "score": rank[1]}
        alarm = health_alarm(metrics, policy.sampler)
        return Scores(metrics, (*rank, float(examples)), alarm)


def check_tuning_seeds(seeds: range, protocol: EvalProtocol) -> None:
    """Refuse rollouts while training on seeds that are there to be reported, or were trained on.

    Raises:
        ConfigError: which ones overlap.
    """
    reserved = {"the protocol's own": protocol.default_seeds}
    if protocol.training_seeds is not None:
        reserved["the demonstrations'"] = protocol.training_seeds
    for whose, (first, last) in reserved.items():
        if seeds.start <= last and first < seeds.stop:
            raise ConfigError(
                f"eval.first_seed={seeds.start} with eval.episodes={len(seeds)} takes seeds "
                f"{seeds.start}-{seeds.stop - 1}, but {first}-{last} are {whose} for "
                f"{protocol.name}: a policy chosen on them could not be scored on them. "
                "Use another eval.first_seed, e.g. 500000"
            )
