"""The demo: train a one-step policy on the bundled demonstrations, score it, film it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.model_card import BEST, RESULT
from cmpolicy.experiment.run import CONFIG_FILE, read_yaml
from cmpolicy.experiment.train import resume, train
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError
from cmpolicy.training.checkpoint import load_state, state_path
from cmpolicy.training.curves import CURVES_FILE
from cmpolicy_eval.evaluate import ScoredEpisodes, evaluate
from cmpolicy_eval.protocol import EvalProtocol, get_protocol
from cmpolicy_eval.rollout import EpisodeResult
from cmpolicy_eval.video import annotate, replay

VIDEO = "rollouts.mp4"
_CALLS = 200
_TILE = 256  # width of an episode in the video, px, a multiple of 16


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Of the demo itself.

    Args:
        out: folder of the run, the result and the video.
        episodes: scored episodes.
        first_seed: of them.
        videos: episodes in the video, at most so many as are scored.
    """

    out: str = "outputs/demo"
    episodes: int = 50
    first_seed: int = 100_000
    videos: int = 6

    def __post_init__(self) -> None:
        if self.episodes < 1 or not 0 <= self.videos <= self.episodes:
            raise ConfigError(
                f"episodes={self.episodes} must be at least 1, and videos={self.videos} between 0 "
                "and that"
            )


def run_demo(demo: DemoSettings, config: TrainConfig, *, command: str) -> int:
    """Train, score and film; 0, or 128 and the signal that stopped the training.

    Args:
        demo: of the demo itself.
        config: of the training, of a task with a simulator.
        command: that goes on after a stop, and is recorded.

    Raises:
        ConfigError: a task without a simulator; else as ``train`` and ``evaluate``.
    """
    if config.task.protocol is None:
        raise ConfigError(f"the demo needs a task with a simulator, not {config.task.name!r}")
    protocol = get_protocol(config.task.protocol)
    out = Path(demo.out).expanduser()

    begin = time.monotonic()
    finished, resumable = _clear_the_place(out, config)
    if finished:
        print(f"{out} holds this demo's training already: scoring it again")
    else:
        print(f"training on {config.data.name}: {config.examples} examples, ten to twenty minutes")
        result = resume(out) if resumable else train(config, out, command=command)
        if not result.finished:
            print(f"stopped at {result.end.examples} examples; `{command}` goes on from there")
            return 128 + (result.end.signum or 0)
    trained = time.monotonic()
    policy = ConsistencyPolicy.from_pretrained(out / BEST)
    scored = evaluate(
        policy,
        protocol,
        range(demo.first_seed, demo.first_seed + demo.episodes),
        nfe=policy.nfe,
        policy_name=str(out / BEST),
        n_workers=config.eval.workers,
        keep_chunks=demo.videos,
        progress="scoring",
        data=config.data.name,
        command=command,
    )
    scored.result.save(out / RESULT)
    if demo.videos:
        write_reel(out / VIDEO, protocol, scored.episodes[: demo.videos])
    milliseconds = _chunk_time(policy)
    print(
        _summary(
            out, scored, milliseconds, trained - begin, time.monotonic() - trained, demo.videos
        )
    )
    return 0


def _clear_the_place(out: Path, config: TrainConfig) -> tuple[bool, bool]:
    """What ``out`` holds of this very demo: (it is trained, it can be resumed).

    Anything else there is moved aside, never deleted.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False, False
    if state_path(out).is_file():
        same = TrainConfig.from_mapping(read_yaml(out / CONFIG_FILE)) == config
        values = load_state(out).values
        # The last evaluation chooses the policy; a run that was stopped in it goes on with it.
        done = (
            values["examples"] >= config.examples and values["evaluated_at"] == values["examples"]
        )
        if same and not (done and not (out / BEST).is_dir()):
            return done, True
    aside = next(
        p for n in range(1, 1000) if not (p := out.with_name(f"{out.name}-before-{n}")).exists()
    )
    out.rename(aside)
    print(f"{out} held something else, which is now in {aside}")
    return False, False


def _chunk_time(policy: ConsistencyPolicy) -> float:
    """Median milliseconds of one decision at batch 1."""
    spec = policy.spec
    obs = spec.zeros()
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        policy.infer(obs)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def write_reel(path: Path, protocol: EvalProtocol, episodes: Sequence[EpisodeResult]) -> Path:
    """An mp4 of several episodes side by side, at the real 10 Hz; the plan is drawn.

    Args:
        path: of the video.
        protocol: of the episodes.
        episodes: with their chunks kept; one that is over stays on its last moment.
    """
    columns = math.ceil(math.sqrt(len(episodes)))
    tracks = [replay(protocol, episode) for episode in episodes]
    last: list[np.ndarray[Any, np.dtype[np.uint8]]] = [np.zeros((1, 1, 3), np.uint8)] * len(tracks)
    writer: Any = imageio.get_writer(
        path, fps=10, codec="libx264", quality=7, pixelformat="yuv420p", macro_block_size=16
    )
    with closing(writer):
        for moments in zip_longest(*tracks):
            for index, moment in enumerate(moments):
                if moment is not None:
                    frame = Image.fromarray(annotate(moment, episodes[index].seed))
                    height = round(frame.height * _TILE / frame.width)
                    last[index] = np.asarray(frame.resize((_TILE, height)), dtype=np.uint8)
            blank = [np.full_like(last[0], 255)] * (-len(last) % columns)
            rows = [*last, *blank]
            page = [np.hstack(rows[i : i + columns]) for i in range(0, len(rows), columns)]
            writer.append_data(np.vstack(page))
    return path


def _summary(
    out: Path, scored: ScoredEpisodes, ms: float, train_s: float, score_s: float, videos: int
) -> str:
    result = scored.result
    low, high = (f"{100 * bound:.0f}" for bound in result.success_ci95)
    score_low, score_high = result.score_ci95
    files = {
        BEST: "the policy bundle: ConsistencyPolicy.from_pretrained(<this folder>)",
        RESULT: "every episode of the evaluation",
        VIDEO: f"the first {videos} of them, with the plans",
        CURVES_FILE: "learning curves",
    }
    there = {out / name: what for name, what in files.items() if (out / name).exists()}
    score = f"{result.score_mean:.3f}   (95 % interval {score_low:.3f}-{score_high:.3f})"
    times = f"training {train_s / 60:.1f} min, scoring and filming {score_s:.0f} s"
    return "\n".join(
        [
            "",
            f"Push-T, protocol {result.protocol}, seeds {result.seeds[0]}-{result.seeds[-1]}",
            f"  score          {score}",
            f"  success        {result.success_rate:.0%}   (95 % interval {low}-{high} %)",
            f"  evaluations    {result.nfe} of the network per action chunk",
            f"  latency        {ms:.1f} ms per action chunk (median, batch 1, {result.device})",
            f"  time           {times}",
            "",
            *(f"  {path!s:<26} {what}" for path, what in there.items()),
        ]
    )
