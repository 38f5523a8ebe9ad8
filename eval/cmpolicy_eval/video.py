"""Videos and grids of scored episodes, with the plan drawn in.

Nothing is inferred again: the actions that :func:`cmpolicy_eval.rollout.rollout` kept are replayed
in a rendering environment, so the pictures show the very episodes that were scored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cmpolicy_eval.protocol import EvalProtocol
from cmpolicy_eval.rollout import EpisodeResult

Frame = NDArray[np.uint8]

_TILE = 192  # width of an episode in a grid, px
_STRIP = 32  # height of the caption; with a 512 px image the frame stays a multiple of 16
_DONE = (120, 120, 120)  # executed part of the plan
_AHEAD = (222, 66, 32)  # part still to be executed
_BEYOND = (240, 160, 138)  # what the next decision replaces
_TEXT = (40, 40, 40)
_SUCCESS = (24, 128, 56)


class View(NamedTuple):
    """What a policy sees of a camera: height and width of its frames, and of their crop."""

    frame: tuple[int, ...]
    crop: tuple[int, int]


@dataclass(frozen=True)
class Moment:
    """One instant of a replayed episode."""

    image: Frame
    """(H, W, 3) as rendered, unmarked."""
    step: int
    coverage: float | None
    success: bool
    plan: NDArray[np.float64] | None
    """(P, 2) pixels of the plan under way, or (P, arms, 2); None where it cannot be drawn.

    Of a policy that tells its chunks alone, the chunk.

    As seen when it was decided: where actions are moves, they lead on from there.
    """
    n_executed: int
    """How many actions of ``plan`` have been executed."""
    n_chosen: int | None = None
    """How many will have been when the next decision is made; None: all of them."""
    seen: Mapping[str, Frame] = field(default_factory=dict)
    """Camera frames (H, W, 3) of the observation, by key."""


def replay(protocol: EvalProtocol, episode: EpisodeResult, *, every: int = 1) -> Iterator[Moment]:
    """Moments of an episode: after the reset, after every ``every``-th step, after the last.

    Raises:
        ValueError: the chunks of the episode were not kept.
        RuntimeError: the replay ends elsewhere, so the environment is not deterministic.
    """
    if episode.chunks is None:
        raise ValueError(
            f"the action chunks of seed {episode.seed} were not kept; pass keep_chunks to rollout"
        )
    env = protocol.make_env(render_mode="rgb_array")
    try:
        to_pixels: Callable[[Any], Any] | None = getattr(env.unwrapped, "action_pixels", None)
        n_chunks, chunk_length, _ = episode.chunks.shape
        actions = episode.chunks.reshape(n_chunks * chunk_length, -1)
        plans = episode.chunks if episode.plans is None else episode.plans
        obs, info = env.reset(seed=episode.seed, options=protocol.reset_options(episode.seed))
        success, plan = False, None
        for step in range(episode.length + 1):
            if step > 0:
                obs, _, _, _, info = env.step(actions[step - 1])
                success = success or bool(info["is_success"])
            # At the seam of two chunks the plan is the new one, decided on what is seen here.
            current = min(step // chunk_length, n_chunks - 1)
            if to_pixels is not None and step == current * chunk_length:
                plan = np.asarray(to_pixels(plans[current]))
            if step % every and step != episode.length:
                continue
            yield Moment(
                image=_picture(env.render()),
                step=step,
                coverage=float(info["coverage"]) if "coverage" in info else None,
                success=bool(info.get("is_success", False)),  # of a reset it need not say
                plan=plan,
                n_executed=step - current * chunk_length,
                n_chosen=chunk_length,
                seen={key: value for key, value in obs.items() if np.asarray(value).ndim == 3},
            )
        if success != episode.success:
            raise RuntimeError(
                f"replaying seed {episode.seed} ended with success={success}, the scored episode "
                f"with success={episode.success}: the environment is not deterministic"
            )
    finally:
        env.close()


def _picture(rendered: Any) -> NDArray[np.uint8]:
    """What ``render()`` gave, (H, W, 3) uint8."""
    image = np.asarray(rendered)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        what = "None" if rendered is None else f"{image.dtype} of shape {image.shape}"
        raise RuntimeError(f"render() gave {what}, expected (H, W, 3) uint8")
    return image


def write_video(
    path: str | Path,
    protocol: EvalProtocol,
    episode: EpisodeResult,
    *,
    views: Mapping[str, View] | None = None,
) -> Path:
    """Write an mp4 of one episode in real time, ``length + 1`` frames; returns the path.

    ``views``: see :func:`annotate`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # yuv420p and baseline settings: plays in browsers and on the README page.
    writer: Any = imageio.get_writer(
        target,
        fps=protocol.control_hz,
        codec="libx264",
        quality=7,
        pixelformat="yuv420p",
        macro_block_size=16,
    )
    with closing(writer):
        for moment in replay(protocol, episode):
            writer.append_data(annotate(moment, episode.seed, views))
    return target


def write_videos(
    folder: str | Path,
    protocol: EvalProtocol,
    episodes: Sequence[EpisodeResult],
    label: str = "",
    views: Mapping[str, View] | None = None,
) -> list[Path]:
    """One mp4 per episode, ``seed_<seed><label>.mp4``; ``views``: see :func:`annotate`."""
    return [
        write_video(
            Path(folder) / f"seed_{episode.seed}{label}.mp4", protocol, episode, views=views
        )
        for episode in episodes
    ]


def write_grid(path: str | Path, protocol: EvalProtocol, episodes: Sequence[EpisodeResult]) -> Path:
    """A GIF of all episodes side by side, small enough for a README.

    An episode that is over stays on its last moment. At least one is needed, with its chunks kept.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tracks = [
        [_tile(annotate(moment, episode.seed)) for moment in replay(protocol, episode, every=3)]
        for episode in episodes
    ]
    count = max(len(track) for track in tracks)
    pages = [
        _page([track[min(index, len(track) - 1)] for track in tracks]) for index in range(count)
    ]
    palette = pages[0].quantize(64, dither=Image.Dither.NONE)
    flat = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    flat[0].save(target, save_all=True, append_images=flat[1:], duration=100, loop=0)
    return target


def annotate(moment: Moment, seed: int, views: Mapping[str, View] | None = None) -> Frame:
    """The image with the chunk drawn on it, and a caption above: (H + 32, W, 3).

    With ``views``, what a policy sees of each camera, the cameras' frames are shown beside it, half
    as wide, with what is seen framed.
    """
    image = np.ascontiguousarray(moment.image)
    if moment.plan is not None:
        image = image.copy()
        plans = moment.plan[:, None] if moment.plan.ndim == 2 else moment.plan
        for arm in range(plans.shape[1]):
            n_chosen = len(plans) if moment.n_chosen is None else moment.n_chosen
            _draw_plan(image, plans[:, arm], moment.n_executed, n_chosen)
    if views and moment.seen:
        image = np.concatenate([image, _cameras(moment.seen, views, image.shape[0])], axis=1)
    width = image.shape[1]
    strip = Image.new("RGB", (width, _STRIP), "white")
    draw = ImageDraw.Draw(strip)
    where = f"seed {seed}   step {moment.step}"
    told = [] if moment.coverage is None else [f"coverage {moment.coverage:.2f}"]
    text = "   ".join(told + ["success"] * moment.success)
    font = _font_for(f"{where}  {text}", width - 20)
    draw.text((10, 7), where, fill=_TEXT, font=font)
    colour = _SUCCESS if moment.success else _TEXT
    draw.text((width - 10, 7), text, fill=colour, font=font, anchor="ra")
    return np.concatenate([np.asarray(strip), image])


def _cameras(seen: Mapping[str, Frame], views: Mapping[str, View], height: int) -> Frame:
    """Frames one below the other, (height, height / 2, 3), with the crop of each drawn."""
    width = height // 2
    panel = np.full((height, width, 3), 255, np.uint8)
    slot = height // max(2, len(views))
    for row, (key, view) in enumerate(views.items()):
        frame = np.asarray(seen[key])
        # the policy scales a frame of another size until it covers its own
        larger = min(frame.shape[0] / view.frame[0], frame.shape[1] / view.frame[1])
        crop_height, crop_width = view.crop[0] * larger, view.crop[1] * larger
        scale = min(width / frame.shape[1], slot / frame.shape[0])
        size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
        big = np.ascontiguousarray(cv2.resize(frame, size, interpolation=cv2.INTER_NEAREST))
        top, left = (frame.shape[0] - crop_height) / 2, (frame.shape[1] - crop_width) / 2
        corners = [(left, top), (left + crop_width, top + crop_height)]
        start, end = ((round(x * scale), round(y * scale)) for x, y in corners)
        cv2.rectangle(big, start, (end[0] - 1, end[1] - 1), _AHEAD, 2)
        panel[row * slot : row * slot + size[1], : size[0]] = big
    return panel


def _draw_plan(image: Frame, plan: NDArray[np.float64], n_executed: int, n_chosen: int) -> None:
    """Executed actions: grey, thin, hollow. Chosen ones: red, joined to the last executed.

    What was planned beyond them: pale, thin.
    """
    shift = 4  # sub-pixel bits of OpenCV
    points = np.round(plan * 2**shift).astype(np.int32)
    radius = max(2, image.shape[1] // 170)
    parts = [
        (points[max(0, n_chosen - 1) :], _BEYOND, 2),
        (points[:n_executed], _DONE, 1),
        (points[max(0, n_executed - 1) : n_chosen], _AHEAD, 2),
    ]
    for line, colour, thickness in parts:
        cv2.polylines(image, [line[:, None]], False, colour, thickness, cv2.LINE_AA, shift)
    for index, (x, y) in enumerate(points[:n_chosen].tolist()):
        executed = index < n_executed
        colour, thickness = (_DONE, 1) if executed else (_AHEAD, -1)
        cv2.circle(image, (x, y), radius << shift, colour, thickness, cv2.LINE_AA, shift)


def _tile(frame: Frame) -> Image.Image:
    image = Image.fromarray(frame)
    height = round(image.height * _TILE / image.width)
    return image.resize((_TILE, height), Image.Resampling.LANCZOS)


def _page(tiles: Sequence[Image.Image]) -> Image.Image:
    columns, gap = min(4, len(tiles)), 4
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    page = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (225, 225, 225)
    )
    for index, tile in enumerate(tiles):
        x, y = index % columns, index // columns
        page.paste(tile, (gap + x * (width + gap), gap + y * (height + gap)))
    return page


@lru_cache(maxsize=16)
def _font(size: int = 17) -> Any:
    return ImageFont.load_default(size=size)


def _font_for(text: str, width: int) -> Any:
    """The largest one in which the text is no wider, within reason."""
    return next((f for f in map(_font, range(17, 8, -1)) if f.getlength(text) <= width), _font(8))
