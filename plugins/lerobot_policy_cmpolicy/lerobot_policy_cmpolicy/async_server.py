"""LeRobot's asynchronous inference server with this policy among those it serves.

``python -m lerobot_policy_cmpolicy.async_server --host=127.0.0.1 --port=8080``. The server of
lerobot 0.4.4 has a fixed list of policies and imports no plug-in; its client needs nothing.
"""

from __future__ import annotations

import sys

import lerobot.async_inference.constants as known

from lerobot_policy_cmpolicy.modeling_cmpolicy import CmpolicyPolicy


def allow() -> None:
    """Put this policy on the server's list."""
    if CmpolicyPolicy.name not in known.SUPPORTED_POLICIES:
        known.SUPPORTED_POLICIES.append(CmpolicyPolicy.name)


def main() -> int:
    """The command; its settings are those of LeRobot's server."""
    try:
        import grpc  # noqa: F401
    except ImportError:
        print("the asynchronous server needs gRPC: pip install 'lerobot[async]'", file=sys.stderr)
        return 2
    from lerobot.async_inference.policy_server import serve

    allow()
    serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
