"""What the real lerobot does in its own environment, for test_real_lerobot.py; no test itself.

``python lerobot_side.py write FOLDER`` writes data sets by lerobot's own API,
``load FOLDER OUT.npz`` reads one as lerobot's training does.
"""

import sys
from pathlib import Path

import numpy as np

EPISODES = ((13, "push the block"), (8, "lift it"), (21, "push the block"))
SIZES = {"top": (64, 96), "wrist": (72, 64)}


def picture(episode: int, step: int, height: int, width: int) -> np.ndarray:
    """A frame that says which one it is."""
    y, x = np.mgrid[:height, :width]
    blue = np.full((height, width), (7 * step + 50 * episode) % 256)
    return np.stack([(x + 3 * step) % 128, (y + 20 * episode) % 128, blue], -1).astype(np.uint8)


def write(folder: Path) -> None:
    """Two cameras, three episodes, two tasks, with videos and with images."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    for mode in ("video", "image"):
        axes = ["height", "width", "channels"]
        features = {
            "observation.state": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
            "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
            "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        }
        for camera, size in SIZES.items():
            shape = (*size, 3)
            features[f"observation.images.{camera}"] = {
                "dtype": mode, "shape": shape, "names": axes,
            }  # fmt: skip
        data = LeRobotDataset.create(
            f"test/{mode}",
            10,
            features,
            root=folder / mode,
            robot_type="arm",
            use_videos=mode == "video",
        )
        rng = np.random.default_rng(0)
        kept = []
        for episode, (length, task) in enumerate(EPISODES):
            for step in range(length):
                numbers = rng.normal(size=6).astype(np.float32)
                kept.append(numbers)
                frame = {
                    "observation.state": numbers[:4],
                    "action": numbers[4:],
                    "next.reward": np.zeros(1, np.float32),
                    "task": task,
                }
                for camera, size in SIZES.items():
                    frame[f"observation.images.{camera}"] = picture(episode, step, *size)
                data.add_frame(frame)
            data.save_episode()
        data.finalize()
        np.save(folder / f"{mode}.npy", np.stack(kept))


def load(folder: Path, out: Path) -> None:
    """Every item, as a data loader gets it."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    data = LeRobotDataset("test/data", root=folder, video_backend="pyav")
    items = [data[i] for i in range(len(data))]
    found = {
        "fps": data.fps,
        "episodes": data.num_episodes,
        "tasks": [item["task"] for item in items],
        "episode": [int(item["episode_index"]) for item in items],
        "mean": data.meta.stats["action"]["mean"],
    }
    for key in data.features:
        if key == "action" or key.startswith("observation"):
            found[key] = np.stack([item[key].numpy() for item in items])
    np.savez(out, **found)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        load(Path(sys.argv[2]), Path(sys.argv[3]))
