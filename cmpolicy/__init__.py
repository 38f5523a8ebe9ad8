"""One-step consistency policies: trained from scratch, scored in simulation, run on a robot.

The public entry point is `ConsistencyPolicy`; it is resolved on first use, so that
`import cmpolicy` alone (a version check, a command's --help) does not load torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmpolicy.policy.consistency import ConsistencyPolicy

__version__ = "0.1.0"
__all__ = ["ConsistencyPolicy", "__version__"]


def __getattr__(name: str) -> object:
    """Resolve the lazy exports (PEP 562)."""
    if name == "ConsistencyPolicy":
        from cmpolicy.policy.consistency import ConsistencyPolicy

        return ConsistencyPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
