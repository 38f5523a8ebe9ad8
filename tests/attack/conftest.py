"""How much the attacks do: little in the suite, at scale 1000 what ``make attack`` promises."""

import pytest


@pytest.fixture(scope="session")
def attack_scale(request: pytest.FixtureRequest) -> int:
    """Factor on the number of messages, kills and damaged files."""
    scale: int = request.config.getoption("--attack-scale")
    return scale
