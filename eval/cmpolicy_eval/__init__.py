"""Scoring of action-chunk policies: protocols, rollouts, intervals, results, reports, videos.

Knows no network library: anything with the :class:`ActionChunkPolicy` attributes can be scored.
"""

from cmpolicy_eval.policy import ActionChunkPolicy, PolicyMismatchError
from cmpolicy_eval.protocol import PROTOCOLS, EvalProtocol, get_protocol
from cmpolicy_eval.rollout import EpisodeResult, RolloutError, rollout

__all__ = [
    "PROTOCOLS",
    "ActionChunkPolicy",
    "EpisodeResult",
    "EvalProtocol",
    "PolicyMismatchError",
    "RolloutError",
    "get_protocol",
    "rollout",
]
