"""What the plug-in does beside the real lerobot, for test_lerobot_plugin.py; no test itself.

``python lerobot_plugin_side.py act CHECKPOINT OUT.npz`` writes what the plug-in does for some
observations and noise; ``wrap BUNDLE OUT`` makes a checkpoint of a bundle; ``serve CHECKPOINT
OUT.npz`` runs lerobot's asynchronous server and client with a robot that notes what it is told;
``drive CHECKPOINT OUT.npz`` runs that robot in cmpolicy's loop; ``refuse CHECKPOINT OUT.txt`` asks
for real-time chunking in lerobot's ways.
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


def wrap(bundle: Path, out: Path) -> None:
    """A bundle as a checkpoint, and one more time through the policy itself."""
    from lerobot_policy_cmpolicy import CmpolicyPolicy, to_lerobot

    to_lerobot(bundle, out)
    CmpolicyPolicy.from_pretrained(bundle).save_pretrained(out.with_name("again"))


def drive(checkpoint: Path, out: Path) -> None:
    """Three seconds of a robot that lerobot made, in cmpolicy's loop."""
    from lerobot.robots.utils import make_robot_from_config
    from lerobot_robot_dummy import DummyRobotConfig

    from cmpolicy.policy.policy import ConsistencyPolicy
    from cmpolicy.robot import ControlLoop, LeRobotAdapter, SafetyLimits

    robot = make_robot_from_config(DummyRobotConfig())
    joints = list(robot.action_features)
    adapted = LeRobotAdapter(robot, observation={"state": joints})
    limits = SafetyLimits(low=-0.5, high=0.5)
    policy = ConsistencyPolicy.from_pretrained(checkpoint / "cmpolicy")
    with ControlLoop(policy, adapted, safety=limits, seed=0) as loop:
        report = loop.run(seconds=3)
        connected = robot.is_connected
    np.savez(
        out,
        actions=robot.told,
        ticks=report.ticks,
        hz=policy.control_hz,
        connected=[connected, robot.is_connected],
    )


def refuse(checkpoint: Path, out: Path) -> None:
    """What is said where a deployment script of lerobot switches real-time chunking on."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot_policy_cmpolicy import CmpolicyPolicy

    policy = CmpolicyPolicy.from_pretrained(checkpoint)
    seen = {"observation.state": torch.zeros(1, 2)}
    said = []
    for chunking in (
        lambda: policy.predict_action_chunk(seen, inference_delay=2),
        lambda: policy.predict_action_chunk(seen, prev_chunk_left_over=torch.zeros(8, 2)),
        policy.init_rtc_processor,
    ):
        policy.config.rtc_config = RTCConfig(enabled=True)
        try:
            chunking()
        except ValueError as error:
            said.append(str(error))
    policy.config.rtc_config = RTCConfig(enabled=False)
    policy.init_rtc_processor()
    policy.predict_action_chunk(seen, inference_delay=None, prev_chunk_left_over=None)
    out.write_text("\n".join(said))


def forget(checkpoint: Path, out: Path) -> None:
    """The observations that a training step encodes, of 400 windows."""
    from lerobot_policy_cmpolicy import CmpolicyPolicy

    policy = CmpolicyPolicy.from_pretrained(checkpoint)
    policy.config.forget_history = 0.25
    seen: list[torch.Tensor] = []
    encode = policy.policy.encode

    def watched(obs, augment=None):
        seen.append(obs["state"])
        return encode(obs, augment)

    policy.policy.encode = watched
    states = torch.rand(400, 2, 2)
    batch = {
        "observation.state": states,
        "observation.image": torch.rand(400, 2, 3, 96, 96),
        "action": torch.rand(400, 16, 2),
    }
    torch.manual_seed(0)
    with torch.no_grad():
        policy.train().forward(dict(batch))
        policy.eval().forward(dict(batch))
    np.savez(out, given=states, training=seen[0], scoring=seen[1])


def serve(checkpoint: Path, out: Path) -> None:
    """Thirty actions, or as many as two minutes give."""
    import socket
    import subprocess
    import threading
    import time

    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient
    from lerobot_robot_dummy import DummyRobotConfig

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lerobot_policy_cmpolicy.async_server", f"--port={port}"]
    server = subprocess.Popen([*command, "--host=127.0.0.1", "--fps=10"])
    try:
        client = RobotClient(
            RobotClientConfig(
                robot=DummyRobotConfig(),
                policy_type="cmpolicy",
                pretrained_name_or_path=str(checkpoint),
                actions_per_chunk=10,
                server_address=f"127.0.0.1:{port}",
                policy_device="cpu",
                fps=10,
                task="reach",
            )
        )
        end = time.monotonic() + 120
        while not client.start():
            assert time.monotonic() < end, "the server does not answer"
            assert server.poll() is None, "the server ended"
            time.sleep(1)
        threads = [threading.Thread(target=client.receive_actions, daemon=True)]
        threads += [threading.Thread(target=client.control_loop, args=("reach",), daemon=True)]
        for thread in threads:
            thread.start()
        while len(client.robot.told) < 30 and time.monotonic() < end:
            time.sleep(0.2)
        told = np.array(client.robot.told)
        client.stop()
    finally:
        server.terminate()
        server.wait()
    np.savez(out, actions=told)


if __name__ == "__main__":
    done = {f.__name__: f for f in (act, wrap, serve, drive, refuse, forget)}
    done[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
