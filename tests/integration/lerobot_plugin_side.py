"""What the plug-in does beside the real lerobot, for test_lerobot_plugin.py; no test itself.

``python lerobot_plugin_side.py act CHECKPOINT OUT.npz`` writes the actions of the plug-in and those
of the bundle inside the checkpoint, for the same observations and noise.
"""

import sys
from pathlib import Path

import numpy as np
import torch


def act(checkpoint: Path, out: Path) -> None:
    """One episode of nine steps, in which every eighth makes a new chunk."""
    import lerobot_policy_cmpolicy  # noqa: F401
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(checkpoint, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(checkpoint))
    rng = np.random.default_rng(0)
    states = rng.uniform(0, 512, (9, 2)).astype(np.float32)
    frames = rng.integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
    noise = torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(0))
    policy.reset()
    actions = []
    for state, frame in zip(states, frames, strict=True):
        seen = {
            "observation.state": torch.from_numpy(state),
            "observation.image": torch.from_numpy(frame).permute(2, 0, 1) / 255,
        }
        actions.append(after(policy.select_action(before(seen), noise=noise)).numpy()[0])
    chunk = policy.predict_action_chunk(
        {
            "observation.state": torch.from_numpy(states[None, 7:]),
            "observation.image": torch.from_numpy(frames[None, 7:]).permute(0, 1, 4, 2, 3) / 255,
        },
        noise=noise,
    )
    np.savez(
        out, states=states, frames=frames, noise=noise.numpy(), actions=actions, chunk=chunk.numpy()
    )


def wrap(bundle: str, out: Path) -> None:
    """A bundle as a checkpoint, and one more time through the policy itself."""
    from lerobot_policy_cmpolicy import CmpolicyPolicy, to_lerobot

    to_lerobot(bundle, out)
    CmpolicyPolicy.from_pretrained(bundle).save_pretrained(out.with_name("again"))


if __name__ == "__main__":
    if sys.argv[1] == "act":
        act(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        wrap(sys.argv[2], Path(sys.argv[3]))
