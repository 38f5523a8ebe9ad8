"""Videos show the scored episodes: frame counts, what is drawn, and that replays agree."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from cmpolicy_envs.pusht import PushTEnv
from cmpolicy_eval import EpisodeResult, get_protocol, rollout
from cmpolicy_eval.video import Moment, View, annotate, replay, write_grid, write_videos

PROTOCOL = get_protocol("pusht-dp")


@dataclass
class ToTheBlock:
    n_obs_steps: int = 2
    n_action_steps: int = 8

    def infer(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        agent, block = obs["agent_pos"][:, -1], obs["keypoint"][:, -1].mean(1)
        share = np.linspace(0.2, 1.0, 8, dtype=np.float32)[None, :, None]
        return agent[:, None] + share * (block - agent)[:, None]


@pytest.fixture(scope="module")
def episodes() -> list[EpisodeResult]:
    return rollout(
        PROTOCOL.make_env,
        ToTheBlock(),
        [100_000, 100_001],
        max_steps=20,
        reset_options=PROTOCOL.reset_options,
        n_workers=1,
        batch_size=2,
        keep_chunks=2,
    )


def test_video_decodes_with_one_frame_per_step(
    episodes: list[EpisodeResult], tmp_path: Path
) -> None:
    (path,) = write_videos(tmp_path, PROTOCOL, episodes[:1], "_nfe1")
    assert path.name == "seed_100000_nfe1.mp4"
    with imageio.get_reader(path) as reader:
        frames = list(reader.iter_data())
        assert reader.get_meta_data()["fps"] == 10
    assert len(frames) == 21
    assert frames[0].shape == (544, 512, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_replay_walks_through_the_chunks(episodes: list[EpisodeResult]) -> None:
    moments = list(replay(PROTOCOL, episodes[0]))
    assert [m.step for m in moments] == list(range(21))
    # the seam of two chunks shows the new plan; the last moment the rest of the last one
    assert [m.n_executed for m in moments] == [*range(8), *range(8), *range(5)]
    np.testing.assert_array_equal(moments[8].plan, moments[15].plan)
    assert not np.array_equal(moments[7].plan, moments[8].plan)
    assert [m.step for m in replay(PROTOCOL, episodes[0], every=6)] == [0, 6, 12, 18, 20]


def test_executed_and_remaining_actions_look_different(episodes: list[EpisodeResult]) -> None:
    moment = list(replay(PROTOCOL, episodes[0]))[4]
    frame = annotate(moment, 100_000)
    assert frame.shape == (544, 512, 3)
    assert moment.plan is not None
    red = (frame[32:].astype(int) - [222, 66, 32]) ** 2
    is_red = red.sum(-1) < 300

    def near(index: int) -> bool:
        x, y = np.round(moment.plan[index]).astype(int)  # type: ignore[index]
        return bool(is_red[y - 2 : y + 3, x - 2 : x + 3].any())

    assert near(6)
    assert not near(0)
    assert (frame[:32] < 100).any()  # the caption


class Planner(ToTheBlock):
    """Tells its plan too, which leads on beyond the chunk."""

    def infer_plan(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        chunk = self.infer(obs)
        return np.concatenate([chunk, chunk[:, -1:] + np.float32([[40, 0], [80, 0]])], axis=1)


def test_a_plan_is_shown_beyond_the_actions_that_are_executed() -> None:
    (episode,) = rollout(
        PROTOCOL.make_env,
        Planner(),
        [100_000],
        max_steps=12,
        reset_options=PROTOCOL.reset_options,
        n_workers=0,
        batch_size=1,
        keep_chunks=1,
    )
    assert episode.chunks is not None
    assert episode.plans is not None
    assert episode.plans.shape == (2, 10, 2)
    np.testing.assert_array_equal(episode.plans[:, :8], episode.chunks)
    moment = list(replay(PROTOCOL, episode))[4]
    assert moment.plan is not None
    assert moment.plan.shape == (10, 2)
    assert (moment.n_executed, moment.n_chosen) == (4, 8)
    frame = annotate(moment, 100_000)[32:].astype(int)
    x, y = np.round(moment.plan[8]).astype(int)
    shown = frame[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
    assert np.abs(shown - [240, 160, 138]).max(axis=1).min() < 40  # pale: replaced before it is due
    assert np.abs(shown - [222, 66, 32]).max(axis=1).min() > 60


def _blank(size: int) -> Moment:
    """A black picture with a long caption."""
    image = np.zeros((size, size, 3), np.uint8)
    return Moment(image, step=399, coverage=None, success=True, plan=None, n_executed=0)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((96, 96), (32, 32, 192, 192)),
        ((192, 192), (32, 32, 192, 192)),
        ((96, 192), (80, 16, 96, 96)),
    ],
)
def test_what_is_seen_is_framed_also_in_frames_of_another_size(
    size: tuple[int, int], shown: tuple[int, int, int, int]
) -> None:
    """A crop of 72 from frames of 96, in the middle, where frames are resized too."""
    moment = replace(_blank(512), seen={"image": np.zeros((*size, 3), np.uint8)})
    panel = annotate(moment, 0, {"image": View((96, 96), (72, 72))})[32:, 512:].astype(int)
    rows, columns = np.nonzero(((panel - [222, 66, 32]) ** 2).sum(-1) < 300)
    left, top, width, height = shown
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    np.testing.assert_allclose(found, (left, top, left + width, top + height), atol=1)


def test_grid_is_an_animation(episodes: list[EpisodeResult], tmp_path: Path) -> None:
    with Image.open(write_grid(tmp_path / "g.gif", PROTOCOL, episodes)) as animation:
        assert animation.size == (2 * 196 + 4, 204 + 8)
        assert animation.n_frames == 8  # type: ignore[attr-defined]


def test_what_cannot_be_drawn_is_an_error(episodes: list[EpisodeResult]) -> None:
    with pytest.raises(ValueError, match="seed 100000 were not kept"):
        list(replay(PROTOCOL, replace(episodes[0], chunks=None)))
    with pytest.raises(RuntimeError, match="not deterministic"):
        list(replay(PROTOCOL, replace(episodes[0], success=True)))


def test_a_caption_on_a_small_image_keeps_its_parts_apart() -> None:
    strip = annotate(_blank(256), 4_294_967_295)[:32].astype(int)
    ink = (strip < 230).any(axis=(0, 2))
    told = np.flatnonzero((strip[..., 1] - strip[..., 0] > 10).any(axis=0))
    assert not ink[told[0] - 4 : told[0]].any()
    assert np.flatnonzero(ink)[0] >= 8
    assert told[-1] <= 250


class Silent(PushTEnv):
    """Its reset says nothing of success, and it may have nothing to show."""

    shows: Any = True

    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0], {}

    def render(self) -> Any:
        return super().render() if self.shows is True else self.shows


def test_a_reset_need_not_say_anything(episodes: list[EpisodeResult]) -> None:
    moments = list(replay(replace(PROTOCOL, make_env=Silent), episodes[0]))
    assert [m.success for m in moments] == [False] * 21


@pytest.mark.parametrize(
    ("shown", "words"),
    [(None, "gave None"), (np.zeros((8, 8, 4), np.uint8), r"gave uint8 of shape \(8, 8, 4\)")],
)
def test_what_is_no_picture(
    episodes: list[EpisodeResult], monkeypatch: pytest.MonkeyPatch, shown: Any, words: str
) -> None:
    monkeypatch.setattr(Silent, "shows", shown)
    with pytest.raises(RuntimeError, match=rf"render\(\) {words}"):
        list(replay(replace(PROTOCOL, make_env=Silent), episodes[0]))
