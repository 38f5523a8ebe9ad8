"""What Push-T's camera sees at recorded states, for stores that have states and no frames."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.frames import Frames, gather_frames
from cmpolicy_envs.pusht import PushTImageEnv


def render_pusht_frames(states: npt.NDArray[Any], size: int = 96, *, memory: float) -> Frames:
    """What gym-pusht's camera sees at recorded states.

    Args:
        states: (N, 5) agent xy, block xy, block angle.
        size: height and width.
        memory: as for :func:`load_frames`; rendered frames are kept in the cache in any case.
    """

    def parts() -> Iterator[tuple[int, Frames]]:
        env = PushTImageEnv(image_size=size)
        try:
            for row, state in enumerate(states):
                yield row, env.frame_at(state)[None]
        finally:
            env.close()

    digest = hashlib.blake2b(np.ascontiguousarray(states, np.float64).tobytes(), digest_size=16)
    name = f"pusht {size} {digest.hexdigest()}"
    shape = (len(states), size, size, 3)
    return gather_frames(parts, shape, name, memory, "rendering Push-T", always_file=True)
