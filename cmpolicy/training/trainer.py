"""The training loop: one step, and when to log, evaluate, save and stop.

The trainer knows neither data sets nor simulators: batches, draws and evaluations are callables.
Progress is counted in examples. What a step does is a pure function of (weights, seed, sample
counter), so a resumed run repeats the straight one bit by bit, and R processes together do what one
process does with an R times larger batch: each takes its slice of the same global draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmpolicy.flow.alarm import alarm_counts
from cmpolicy.flow.objectives import Draws
from cmpolicy.training.checkpoint import TrainingState, load_state, save_state, select
from cmpolicy.training.config import LoopConfig
from cmpolicy.training.device import use_bf16
from cmpolicy.training.guard import FiniteGuard, NonFiniteError
from cmpolicy.training.meter import Meter
from cmpolicy.training.optim import ModelEma, build_optimizer, build_schedule, jump_schedule
from cmpolicy.training.signals import StopRequest
from cmpolicy.training.trackers import Kind, Tracker


@dataclass(frozen=True)
class Scores:
    """Result of one evaluation: numbers to log, and ``rank``, of which a larger one is better.

    ``alarm`` says what is wrong with the model, if anything; see :mod:`cmpolicy.flow.alarm`.
    """

    metrics: Mapping[str, float]
    rank: tuple[float, ...]
    alarm: str | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: ``signum`` is the signal that stopped it before it was finished, if any."""

    examples: int
    finished: bool
    signum: int | None
    best: tuple[float, ...] | None
    metrics: Mapping[str, float]


#: batches(first_example, count): those examples of the run, on the device, as the model takes them.
Batches = Callable[[int, int], Any]
#: draw(count, generator): all randomness of a step of ``count`` examples.
DrawStep = Callable[[int, torch.Generator], Draws]
#: score(EMA model, examples)
Score = Callable[[Any, int], Scores]
#: keep("best" or "last", EMA model, examples, its evaluation if it has one)
Keep = Callable[[Literal["best", "last"], Any, int, Scores | None], None]


class Trainer:
    """Trains ``model``, whose forward is ``model(batch, draws=, progress=, ema=) -> LossOutput``.

    Args:
        model: on any device; it is moved.
        config: see :class:`LoopConfig`.
        accelerator: device and processes (``accelerate``); its own mixed precision stays off.
        batches, draw, score, keep: see the types above.
        run_dir: the training state goes into ``run_dir/training_state``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoopConfig,
        *,
        accelerator: Accelerator,
        batches: Batches,
        draw: DrawStep,
        run_dir: Path,
        score: Score | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.run_dir = run_dir
        self.model = model.to(self.device).train()
        self.ema = ModelEma(self.model, config.ema)
        self.examples = 0
        self.best: tuple[float, ...] | None = None
        self._batches, self._draw, self._score, self._keep = batches, draw, score, keep
        self.trackers: Sequence[Tracker] = ()  # take the numbers, in the main process
        self._step_examples: int = config.batch_size * accelerator.num_processes
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self._parameters, config.optim)
        self.schedule = build_schedule(
            self.optimizer,
            config.optim,
            examples=config.examples,
            step_examples=self._step_examples,
        )
        self._forward: nn.Module = accelerator.prepare_model(self.model)
        self._bf16 = use_bf16(config, self.device)
        self._guard = FiniteGuard(self.device)
        self._window = Meter(self.device)
        self.evaluated_at = 0  # example of the latest finished evaluation
        self._scores: Scores | None = None  # the latest of this process
        self.saved_at = 0
        self._agreed_signum: int | None = None
        self._warned = False
        self._metrics: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Training time of the whole run, evaluations not counted."""
        return self._window.seconds

    def train(self, until: int | None = None) -> RunEnd:
        """Run to the end of the run (or to example ``until``, to be resumed), and save.

        Raises:
            NonFiniteError: the last state on disk is from before, and finite.
            CheckpointError: a state could not be written; the previous one is intact.
        """
        stop_at = self.config.examples if until is None else min(until, self.config.examples)
        if self.examples == 0:
            self.save()  # a disk that cannot hold the state is found now, not in an hour
        with StopRequest() as stop:
            self._window.resume_clock()
            if self._evaluation_due(self.examples >= self.config.examples):
                self._run_evaluation(stop)  # the one that a signal cut off
            while self.examples < stop_at and not self._stopping(stop):
                self.step()
                finished = self.examples >= self.config.examples
                if finished or self._due(self.config.log.every):
                    self._log_window()
                if self._evaluation_due(finished):
                    self._run_evaluation(stop)
                if not finished and self.examples // self.config.save_every > (
                    self.saved_at // self.config.save_every
                ):
                    self.save()
            of_these = self._scores if self.evaluated_at == self.examples else None
            self._keep_policy("last", of_these)
            self.save()
            self._window.pause_clock()
        return self.end()

    def end(self) -> RunEnd:
        """How things stand."""
        finished = self.examples >= self.config.examples and not self._evaluation_due(True)
        return RunEnd(self.examples, finished, self._agreed_signum, self.best, dict(self._metrics))

    def step(self) -> None:
        """One optimizer step on the next ``batch_size`` examples of every process."""
        size, rank = self.config.batch_size, self.accelerator.process_index
        batch = self._batches(self.examples + rank * size, size)
        generator = step_generator(self.config.seed, self.examples, self.device)
        draws = self._draw(self._step_examples, generator).slice(rank * size, (rank + 1) * size)
        progress = self.examples / self.config.examples
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._forward(batch, draws=draws, progress=progress, ema=self.ema.model)
        self.accelerator.backward(output.loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, self.config.optim.grad_clip or float("inf"), foreach=True
        )
        self._guard.watch(grad_norm, self.examples)
        if self.device.type == "cpu":
            self._guard.check()  # free here; on a device it would wait, so there the log asks
        self.optimizer.found_inf = self._guard.tripped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.ema.step(self.model)
        self.examples += self._step_examples
        self._window.add({"loss": output.loss.detach(), **output.metrics}, grad_norm)

    # --- logging and evaluation ---------------------------------------------------------------

    def _due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of ``every``."""
        return self.examples // every > (self.examples - self._step_examples) // every

    def _evaluation_due(self, finished: bool) -> bool:
        if self._score is None or self.evaluated_at == self.examples:
            return False
        every = self.config.eval.every
        due = self.examples // every > self.evaluated_at // every
        return finished or due

    def _log_window(self) -> None:
        self._guard.check()
        self._window.reduce(self.accelerator)
        values = self._window.read(self._step_examples)
        values |= {"lr": float(self.schedule.get_last_lr()[0]), "ema_decay": self.ema.decay}
        if not np.isfinite(values["loss"]):
            raise NonFiniteError(self.examples, values["grad_norm"])
        self._metrics.update(values)
        self._log("train", values)

    def _log(self, kind: Kind, values: Mapping[str, float]) -> None:
        for tracker in self.trackers if self.accelerator.is_main_process else ():
            tracker.log(kind, self.examples, values)

    def _run_evaluation(self, stop: StopRequest) -> None:
        """Evaluate the EMA weights on the main process; the others wait."""
        self._guard.check()
        self._window.pause_clock()
        self._keep_policy("last", None)  # whatever becomes of the simulator
        self.save()
        if self.accelerator.is_main_process and self._score is not None:
            try:
                scores = self._score(self.ema.model, self.examples)
            except Exception:
                if stop.signum is None or self.accelerator.num_processes > 1:
                    raise
                return  # Ctrl-C reached the simulators as well; the resumed run evaluates again
            self._log("eval", scores.metrics)
            self._metrics.update(scores.metrics)
            self._scores = scores
            self._warn(scores.alarm)
            if self.best is None or scores.rank > self.best:
                self.best = scores.rank
                self._keep_policy("best", scores)
        self.evaluated_at = self.examples
        self.accelerator.wait_for_everyone()
        self._window.resume_clock()

    def _warn(self, alarm: str | None) -> None:
        """Pass on the first alarm that comes late enough to mean something."""
        late = alarm_counts(self.examples, self.config.examples)
        if alarm is not None and late and not self._warned:
            self._warned = True
            warnings.warn(f"after {self.examples} examples, {alarm}", stacklevel=2)

    def _keep_policy(self, kind: Literal["best", "last"], scores: Scores | None) -> None:
        if self._keep is not None and self.accelerator.is_main_process:
            self._keep(kind, self.ema.model, self.examples, scores)

    def _stopping(self, stop: StopRequest) -> bool:
        """Whether a signal asks for the end; several processes agree on it at log intervals."""
        if self.accelerator.num_processes > 1 and self._due(self.config.log.every):
            # it reaches them at different steps, and each would wait for the others forever
            gathered: Tensor = self.accelerator.gather(
                torch.tensor([stop.signum or 0], device=self.device)
            )
            self._agreed_signum = int(gathered.max().item()) or None
        elif self.accelerator.num_processes == 1:
            self._agreed_signum = stop.signum
        return self._agreed_signum is not None

    # --- state --------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the training state (main process)."""
        self._guard.check()
        if self.accelerator.is_main_process:
            save_state(self.run_dir, self.state())
        self.saved_at = self.examples
        self.accelerator.wait_for_everyone()

    def state(self) -> TrainingState:
        """Everything a resumed run needs; tensors are references."""
        optimizer = self.optimizer.state_dict()["state"]
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.model.state_dict().items()}
        for index, slots in optimizer.items():
            tensors |= {f"optim/{index}/{slot}": v for slot, v in slots.items()}
        tensors |= {f"window/{k}": v for k, v in self._window.sums.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "examples": self.examples,
            "ema_counter": self.ema.counter,
            "best": self.best,
            "evaluated_at": self.evaluated_at,
            "window_steps": self._window.steps,
            "seconds": self._window.seconds,
            "window_seconds": self._window.window_seconds,
            "metrics": _finite(self._metrics),
            "scores": self._scores and {"metrics": _finite(self._scores.metrics)},
        }
        return TrainingState(tensors, values)

    def resume(self) -> None:
        """Continue from the state in ``run_dir``.

        Raises:
            CheckpointError: no or a damaged state.
            ValueError: a state of another network.
        """
        state = load_state(self.run_dir)
        values = state.values
        try:
            self.model.load_state_dict(select(state.tensors, "model"))
            self.ema.model.load_state_dict(select(state.tensors, "ema"))
        except RuntimeError as error:
            raise ValueError(
                f"the training state in {self.run_dir} is of another network than its config.yaml "
                f"describes: {error}"
            ) from error
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in select(state.tensors, "optim").items():
            index, slot = name.split("/")
            slots.setdefault(int(index), {})[slot] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        # in steps of this run: it may have had another number of processes
        jump_schedule(self.schedule, round(int(values["examples"]) / self._step_examples))
        self.ema.counter = int(values["ema_counter"])
        self.examples = self.saved_at = int(values["examples"])
        self.best = None if values["best"] is None else tuple(values["best"])
        self.evaluated_at = int(values["evaluated_at"])
        self._metrics = dict(values["metrics"])
        scores = values.get("scores")  # older states lack it
        self._scores = None if scores is None else Scores(scores["metrics"], ())
        self._window.restore(
            select(state.tensors, "window"),
            int(values["window_steps"]),
            float(values["seconds"]),
            float(values.get("window_seconds", 0.0)),  # older states lack it
        )
        torch.set_rng_state(state.tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["rng/cuda"], self.device)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in values.items() if np.isfinite(v)}


def step_generator(seed: int, examples: int, device: torch.device) -> torch.Generator:
    """The generator of the step that starts at ``examples``: a pure function of its arguments."""
    mixed = np.random.SeedSequence([seed, examples]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed) & (2**63 - 1))
