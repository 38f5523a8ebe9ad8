"""Frames of stores of several kinds, rendered frames, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cmpolicy_data import ReplayBuffer
from cmpolicy_data import frames as reading
from cmpolicy_data.augment import AUGMENTATIONS, AugmentError
from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.convert.pusht_frames import render_pusht_frames
from cmpolicy_data.demonstrations import load_demonstrations
from cmpolicy_data.frames import load_frames, select_frames
from cmpolicy_data.validation import validate
from cmpolicy_envs.pusht import PushTEnv, PushTImageEnv

N = 40
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (N, 16, 20, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/cmpolicy/frames"


def _store(tmp_path: Path, **data: Any) -> ReplayBuffer:
    buffer = ReplayBuffer.create(tmp_path / "cameras.zarr")
    whole = {"action": np.ones((N, 2), np.float32), **data}
    for start, end in ((0, 15), (15, N)):
        buffer.append_episode({key: value[start:end] for key, value in whole.items()})
    return buffer


def test_frames_without_some_stay_in_a_file(tmp_path: Path) -> None:
    buffer = _store(tmp_path, top=FRAMES)
    keep = np.arange(N) % 3 > 0
    mapped, loaded = (load_frames(buffer, "top", memory=m) for m in (1e-6, 1))
    assert select_frames(mapped, np.ones(N, bool)) is mapped
    for frames, kind in ((mapped, np.memmap), (loaded, np.ndarray)):
        found = select_frames(frames, keep)
        assert type(found) is kind
        assert np.array_equal(found, FRAMES[keep])


@pytest.mark.parametrize("memory", [1, 1e-6])
def test_frames_of_other_episodes_are_not_read(
    tmp_path: Path, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are chunks between two that are wanted; one is of four frames."""
    root = zarr.create_group(tmp_path / "cameras.zarr")
    for name, values in (
        ("data/action", np.ones((N, 2))),
        ("data/top", FRAMES),
        ("meta/episode_ends", np.array([5, 17, 18, 31, N])),
    ):
        root.create_array(name, data=values, chunks=(4, *values.shape[1:]))
    buffer = ReplayBuffer.open(tmp_path / "cameras.zarr")
    read, real = [], reading.read_rows

    def spy(array: Any, start: int, stop: int, path: Path) -> Any:
        read.append((start, stop))
        return real(array, start, stop, path)

    monkeypatch.setattr(reading, "read_rows", spy)
    rows = np.r_[0:5, 17:18, 31:N]
    found = load_demonstrations(
        buffer.path, ["top"], episodes=np.array([0, 2, 4]), image_memory=memory
    )
    assert np.array_equal(found.obs["top"], FRAMES[rows])
    assert found.episode_ends.tolist() == [5, 6, 15]
    assert found.source_episode.tolist() == [0, 2, 4]
    assert read == [(0, 5), (17, 18), (31, N)]
    whole = load_demonstrations(buffer.path, ["top"], image_memory=memory)
    assert np.array_equal(whole.obs["top"], FRAMES)  # another file of the cache


def test_a_camera_called_img_is_not_taken_for_the_simulators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusion Policy's usual key; the frames were replaced by pictures of Push-T."""
    monkeypatch.setitem(AUGMENTATIONS, "none", lambda episodes: episodes)
    path = _store(tmp_path, img=FRAMES, state=RNG.uniform(-1, 1, (N, 5))).path
    assert np.array_equal(load_demonstrations(path, ["img", "state"]).obs["img"], FRAMES)
    with pytest.raises(AugmentError, match="cannot transform the frames of 'img'"):
        load_demonstrations(path, ["img", "state"], augment=["none"])
    # an arm whose five numbers are within Push-T's bounds, and Push-T filmed by another camera
    for more in ({}, {"keypoint": np.zeros((N, 9, 2))}):
        (tmp_path / f"{len(more)}").mkdir()
        path = _store(tmp_path / f"{len(more)}", img=FRAMES, state=RNG.random((N, 5)), **more).path
        with pytest.raises(AugmentError, match="cannot transform the frames of 'img'"):
            load_demonstrations(path, ["img", "state"], augment=["none"])
    (tmp_path / "none").mkdir()
    path = _store(tmp_path / "none", other=FRAMES, state=RNG.random((N, 5))).path
    with pytest.raises(ReplayBufferError, match="no key 'img'"):
        load_demonstrations(path, ["img", "state"])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int32])
def test_frames_of_any_number_type(tmp_path: Path, dtype: Any) -> None:
    buffer = _store(tmp_path, top=FRAMES.astype(dtype))
    found = load_frames(buffer, "top", memory=1)
    assert found.dtype == np.uint8
    assert np.array_equal(found, FRAMES)


@pytest.mark.parametrize("said", ["top", {"key": "top", "layout": "chw"}])
def test_channels_first(tmp_path: Path, said: Any) -> None:
    """Small ones trained as numbers, and a network without a camera."""
    path = _store(tmp_path, top=np.moveaxis(FRAMES, -1, 1)).path
    found = load_demonstrations(path, {"top": said})
    assert found.images == ("top",)
    assert np.array_equal(found.obs["top"], FRAMES)


def test_channels_first_when_said_so(tmp_path: Path) -> None:
    path = _store(tmp_path, top=np.moveaxis(FRAMES, -1, 1).astype(np.float32)).path
    found = load_demonstrations(path, {"top": {"key": "top", "layout": "chw"}})
    assert np.array_equal(found.obs["top"], FRAMES)


def test_more_than_memory_takes_is_mapped_from_a_file(tmp_path: Path, cache: Path) -> None:
    buffer = _store(tmp_path, top=FRAMES)
    found = load_frames(buffer, "top", memory=1e-6)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, FRAMES)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    load_frames(buffer, "top", memory=1e-6)
    assert file.stat().st_mtime_ns == written  # made once
    steps = {"action": np.zeros((3, 2), np.float32), "top": FRAMES[:3]}
    buffer.append_episode(steps)
    assert len(load_frames(buffer, "top", memory=1e-6)) == N + 3  # the store has changed
    assert sorted(p.suffix for p in cache.iterdir()) == [".npy", ".npy"]


def test_which_keys_are_images(tmp_path: Path) -> None:
    data = {"top": FRAMES, "pair": np.ones((N, 3, 3), np.float32), "arm": FRAMES[:, 0, :2, 0]}
    path = _store(tmp_path, **data).path
    found = load_demonstrations(path, ["top", "pair", "arm"])
    assert found.images == ("top",)
    assert found.obs["pair"].shape == (N, 3, 3)
    state = load_demonstrations(path, {"top": {"key": "top", "kind": "state"}})
    assert state.images == ()


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (FRAMES / np.float32(255), "episode 1, step 3 .*multiply by 255, round"),
        (FRAMES.astype(np.int32) * 2, r"not in \[0, 255\], first in episode 0, step 0"),
        (FRAMES[..., 0], "grey frames .* store RGB"),
        (np.concatenate([FRAMES, FRAMES[..., :1]], -1), "4 channels .*drop alpha"),
        (np.moveaxis(FRAMES, -1, 1).astype(np.int32), "20 channels as hwc.*they are chw: say so"),
        (FRAMES[:, 0, 0], "an image is"),
    ],
)
def test_what_are_no_frames(tmp_path: Path, frames: Any, words: str) -> None:
    if frames.dtype == np.float32:
        frames = np.where(np.arange(N)[:, None, None, None] < 18, np.float32(0), frames)
    path = _store(tmp_path, top=frames).path
    with pytest.raises(ReplayBufferError, match=words):
        load_demonstrations(path, {"top": {"key": "top", "kind": "image"}})


def _add_v2_array(path: Path, name: str, meta: dict[str, Any], chunks: list[bytes]) -> None:
    folder = path / "data" / name
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps({"zarr_format": 2, "order": "C", **meta}))
    for i, chunk in enumerate(chunks):
        (folder / f"{i}{'.0' * (len(meta['shape']) - 1)}").write_bytes(chunk)


def _v2_store(path: Path) -> Path:
    """Written by another program, as UMI's are."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    for key, value in (("data/action", np.ones((N, 2), "f4")), ("meta/episode_ends", [15, N])):
        array = np.asarray(value)
        root.create_array(key, shape=array.shape, dtype=array.dtype)[:] = array
    return path


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((32, 40), "grey frames .*store RGB: np.repeat"),
        ((32, 40, 1), "they are grey; store RGB: np.repeat"),
        ((32, 40, 4), "4 channels .*drop alpha"),
    ],
)
def test_a_camera_without_three_channels_is_not_taken_for_a_state(
    tmp_path: Path, shape: tuple[int, ...], words: str
) -> None:
    """A policy was trained on the pixels as if they were joints."""
    buffer = _store(tmp_path, cam=np.zeros((N, *shape), np.uint8))
    with pytest.raises(ReplayBufferError, match=rf"{words}.*kind: state"):
        load_demonstrations(buffer.path, ["cam"], "action", ())
    said = load_demonstrations(buffer.path, {"cam": {"key": "cam", "kind": "state"}}, "action", ())
    assert said.obs["cam"].shape[1:] == shape


def test_a_small_array_of_bytes_stays_a_state(tmp_path: Path) -> None:
    buffer = _store(tmp_path, skin=np.zeros((N, 16, 16), np.uint8))
    found = load_demonstrations(buffer.path, ["skin"], "action", ())
    assert not found.images


@pytest.mark.parametrize("codec", ["jpegxl", "jpeg2k"])
def test_frames_in_codecs_of_imagecodecs(tmp_path: Path, codec: str) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    path = _v2_store(tmp_path / "umi.zarr")
    if codec == "jpegxl":
        settings = {"id": "imagecodecs_jpegxl", "lossless": True}
        encode = partial(imagecodecs.jpegxl_encode, lossless=True)
    else:
        settings = {"id": "imagecodecs_jpeg2k", "reversible": True, "level": 0}
        encode = partial(imagecodecs.jpeg2k_encode, reversible=True, level=0)
    meta = {
        "shape": list(FRAMES.shape),
        "chunks": [1, *FRAMES.shape[1:]],
        "dtype": "|u1",
        "compressor": settings,
        "fill_value": 0,
        "filters": None,
    }
    _add_v2_array(path, "camera0_rgb", meta, [bytes(encode(frame)) for frame in FRAMES])
    found = load_demonstrations(path, ["camera0_rgb"])
    assert found.images == ("camera0_rgb",)
    assert np.array_equal(found.obs["camera0_rgb"], FRAMES)


def test_an_array_that_cannot_be_opened_leaves_the_others_alone(tmp_path: Path) -> None:
    path = _v2_store(tmp_path / "other.zarr")
    meta = {"shape": [N], "chunks": [N], "fill_value": 0, "filters": None}
    unknown = {"dtype": "|u1", "compressor": {"id": "imagecodecs_nothing"}}
    objects = {"dtype": "|O", "compressor": None, "filters": [{"id": "pickle", "protocol": 5}]}
    _add_v2_array(path, "camera", meta | unknown, [])
    _add_v2_array(path, "instruction", meta | objects, [])
    (path / "data/.DS_Store").write_bytes(b"x")
    buffer = ReplayBuffer.open(path)
    assert buffer.keys() == ["action"]
    assert len(load_demonstrations(path, ["action"]).action) == N
    with pytest.raises(ReplayBufferError, match=r"data/camera cannot .*cmpolicy\[codecs\]"):
        load_demonstrations(path, ["camera"])
    with pytest.raises(ReplayBufferError, match=r"data/instruction cannot be opened.*objects"):
        buffer.load("instruction")
    problems = [f"{p.key}: {p.message}" for p in validate(path)]
    assert any("camera" in text and "imagecodecs" in text for text in problems)


def test_a_lost_chunk_is_no_black_frame(tmp_path: Path) -> None:
    buffer = _store(tmp_path, top=FRAMES)
    chunk = next(p for p in sorted((buffer.path / "data/top/c").rglob("*")) if p.is_file())
    chunk.unlink()
    with pytest.raises(ReplayBufferError, match=r"chunks of data/top are not there.*steps 0 to"):
        load_frames(buffer, "top", memory=1)


def test_rendered_frames_are_the_cameras(cache: Path) -> None:
    states = np.column_stack([RNG.uniform(100, 400, (5, 4)), RNG.uniform(0, 2 * np.pi, 5)])
    frames = render_pusht_frames(states, memory=1)
    env = PushTImageEnv()
    for state, frame in zip(states, frames, strict=True):
        env.set_pose(state)
        obs = env.get_obs()
        assert np.array_equal(obs["image"], frame)
        assert np.allclose(obs["agent_pos"], state[:2])
        reference = env._get_img(env._draw(), width=96, height=96)  # gym-pusht's own
        assert np.array_equal(frame, reference)
    assert len(list(cache.iterdir())) == 1
    assert np.array_equal(render_pusht_frames(states, memory=1), frames)


def test_rendered_frames_are_those_of_the_human_store(pusht_human: Path) -> None:
    """Mean absolute difference below one grey level."""
    buffer = ReplayBuffer.open(pusht_human)
    rows = slice(0, 40)
    stored = np.asarray(buffer["img"][rows])
    found = render_pusht_frames(np.asarray(buffer["state"][rows]), memory=1)
    assert np.abs(found - stored).mean(axis=(1, 2, 3)).max() < 1


def test_frames_that_a_store_lacks_are_rendered_also_of_mirrored_states(tmp_path: Path) -> None:
    states = RNG.uniform(150, 350, (N, 5)).astype(np.float32)
    path = _store(tmp_path, state=states, keypoint=np.zeros((N, 9, 2), np.float32)).path
    obs = {"image": "img", "agent_pos": "state[:2]"}
    plain = load_demonstrations(path, obs)
    assert plain.images == ("image",)
    assert np.array_equal(plain.obs["image"], render_pusht_frames(states, memory=1))
    doubled = load_demonstrations(path, obs, augment=["mirror"])
    assert len(doubled.obs["image"]) == 2 * N
    assert np.array_equal(doubled.obs["image"][:N], plain.obs["image"])
    # the picture of a mirrored state is the mirrored picture, up to how edges are drawn
    reflected = plain.obs["image"][:, ::-1, ::-1].transpose(0, 2, 1, 3).astype(float)
    assert np.abs(doubled.obs["image"][N:] - reflected).mean() < 4


@pytest.mark.parametrize(
    ("key", "scale"), [("camera_fornt", 1.0), ("img", 0.01), ("img", 10.0)], ids=str
)
def test_a_key_that_is_not_there_becomes_no_pictures_of_push_t(
    tmp_path: Path, key: str, scale: float
) -> None:
    """Other arms have five numbers, too."""
    states = (scale * RNG.uniform(-150, 350, (N, 5))).astype(np.float32)
    path = _store(tmp_path, state=states, camera_front=FRAMES).path
    for source in (key, {"key": key, "kind": "image"}):
        with pytest.raises(ReplayBufferError, match=f"no key '{key}'.*camera_front"):
            load_demonstrations(path, {"top": source})
    with pytest.raises(ValueError, match=r"'camera_front\[4:9\]' takes a part of each step"):
        load_demonstrations(path, {"top": {"key": "camera_front[4:9]", "kind": "image"}})


def test_camera_does_not_change_the_physics() -> None:
    plain, seen = PushTEnv(), PushTImageEnv()
    plain.reset(seed=3)
    image, _ = seen.reset(seed=3)
    assert seen.observation_space.contains(image)
    for action in RNG.uniform(0, 512, (5, 2)):
        _, reward, *_, info = plain.step(action)
        _, other, *_, same = seen.step(action)
        assert reward == other
        assert np.array_equal(info["state"], same["state"])
