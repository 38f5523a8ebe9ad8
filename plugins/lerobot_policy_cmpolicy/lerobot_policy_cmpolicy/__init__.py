"""cmpolicy's one-step policies as a LeRobot policy: ``--policy.type=cmpolicy``.

LeRobot imports every installed package named ``lerobot_policy_...`` and finds the classes by the
names of the modules: ``configuration_``, ``modeling_`` and ``processor_cmpolicy``.
"""

import warnings
from importlib.metadata import version

from lerobot_policy_cmpolicy.configuration_cmpolicy import CmpolicyConfig
from lerobot_policy_cmpolicy.modeling_cmpolicy import CmpolicyPolicy
from lerobot_policy_cmpolicy.processor_cmpolicy import make_cmpolicy_pre_post_processors
from lerobot_policy_cmpolicy.wrap import to_lerobot

__all__ = [
    "CmpolicyConfig",
    "CmpolicyPolicy",
    "make_cmpolicy_pre_post_processors",
    "to_lerobot",
]

#: Versions of lerobot that the tests run against.
KNOWN_LEROBOT = ("0.4.4",)

if version("lerobot") not in KNOWN_LEROBOT:
    warnings.warn(
        f"lerobot_policy_cmpolicy does not know lerobot {version('lerobot')}; it is tested with "
        f"{', '.join(KNOWN_LEROBOT)}. If something fails, install that version.",
        stacklevel=2,
    )
