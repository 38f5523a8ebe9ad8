"""``make demo``: train a one-step policy on the bundled demonstrations, score it, film it.

``python -m cmpolicy.cli.demo [key=value ...]``: ``out``, ``episodes``, ``first_seed`` and
``videos`` are the demo's own; every other word is a setting of ``cmpolicy train``. Exit status as
of ``cmpolicy train``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from cmpolicy.bench.latency import eager_contender, time_calls
from cmpolicy.bench.settings import LatencySettings
from cmpolicy.cli.parse import compose_settings, parse
from cmpolicy.cli.run_command import guarded
from cmpolicy.experiment.model_card import BEST, RESULT
from cmpolicy.experiment.run import load_run_config
from cmpolicy.experiment.train import train
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError, from_mapping
from cmpolicy.train.checkpoint import load_state, state_path
from cmpolicy.train.config import TrainConfig
from cmpolicy.train.curves import CURVES_FILE
from cmpolicy_eval.evaluate import Evaluation, evaluate
from cmpolicy_eval.protocol import EvalProtocol, get_protocol
from cmpolicy_eval.rollout import EpisodeResult
from cmpolicy_eval.video import annotate, replay

PROGRAM = "cmpolicy demo"
COMMAND = "make demo"
VIDEO = "rollouts.mp4"
_CALLS = 200


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Of the demo itself: folder, scored episodes and their first seed, episodes in the video."""

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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _demo(words), PROGRAM)


def _demo(words: Sequence[str]) -> int:
    own = {field.name for field in fields(DemoSettings)}
    overrides = parse(words)
    demo = from_mapping(
        DemoSettings, {o.key_or_group: o.value() for o in overrides if o.key_or_group in own}
    )
    rest = [str(o.input_line) for o in overrides if o.key_or_group not in own]
    settings = compose_settings("train", ["task=pusht", "preset=demo", *rest])
    settings.pop("out")
    config = TrainConfig.from_mapping(settings)
    if config.task.protocol is None:
        raise ConfigError(f"the demo needs a task with a simulator, not {config.task.name!r}")
    protocol = get_protocol(config.task.protocol)
    out = Path(demo.out)
    command = " ".join([COMMAND, *words])

    begin = time.monotonic()
    finished, resume = _clear_the_place(out, config)
    if finished:
        print(f"{out} holds this demo's training already: scoring it again")
    else:
        print(f"training on {config.data.name}: {config.examples} examples, about ten minutes")
        run = train(config, demo.out, command=command, resume=resume)
        if not run.outcome.finished:
            print(f"stopped at {run.outcome.examples} examples; `{command}` goes on from there")
            return 128 + (run.outcome.signum or 0)
    trained = time.monotonic()
    policy = ConsistencyPolicy.from_pretrained(out / BEST)
    policy.nfe = config.eval.nfe
    scored = evaluate(
        policy,
        protocol,
        range(demo.first_seed, demo.first_seed + demo.episodes),
        nfe=config.eval.nfe,
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
    chunk = eager_contender(policy, config.eval.nfe)
    time_calls([chunk], policy, LatencySettings(policy=str(out / BEST), calls=_CALLS))
    print(
        _summary(out, scored, chunk.p50, trained - begin, time.monotonic() - trained, demo.videos)
    )
    return 0


def _clear_the_place(out: Path, config: TrainConfig) -> tuple[bool, bool]:
    """What ``out`` holds of this very demo: (it is trained, it can be resumed).

    Anything else there is moved aside, never deleted.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False, False
    if state_path(out).is_file():
        same = TrainConfig.from_mapping(load_run_config(out)) == config
        done = int(load_state(out).values["examples"]) >= config.examples
        if same and not (done and not (out / BEST).is_dir()):
            return done, True
    aside = next(
        p for n in range(1, 1000) if not (p := out.with_name(f"{out.name}-before-{n}")).exists()
    )
    out.rename(aside)
    print(f"{out} held something else, which is now in {aside}")
    return False, False


def write_reel(
    path: Path, protocol: EvalProtocol, episodes: Sequence[EpisodeResult], *, tile: int = 256
) -> Path:
    """An mp4 of several episodes side by side, at the real 10 Hz; the planned chunk is drawn.

    Args:
        path: of the video.
        protocol: of the episodes.
        episodes: with their chunks kept; one that is over stays on its last moment.
        tile: width of an episode, px, a multiple of 16.
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
                    height = round(frame.height * tile / frame.width)
                    last[index] = np.asarray(frame.resize((tile, height)), dtype=np.uint8)
            blank = [np.full_like(last[0], 255)] * (-len(last) % columns)
            rows = [*last, *blank]
            page = [np.hstack(rows[i : i + columns]) for i in range(0, len(rows), columns)]
            writer.append_data(np.vstack(page))
    return path


def _summary(
    out: Path, scored: Evaluation, ms: float, train_s: float, score_s: float, videos: int
) -> str:
    result = scored.result
    low, high = (f"{100 * bound:.0f}" for bound in result.success_ci95)
    score_low, score_high = result.score_ci95
    files = {
        BEST: "the policy bundle: ConsistencyPolicy.from_pretrained(<this folder>)",
        RESULT: "every episode of the evaluation",
        VIDEO: f"the first {videos} of them, with the planned action chunks",
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


if __name__ == "__main__":
    sys.exit(main())
