"""The initial states of the protocols, written down once and for all."""

import numpy as np
import pytest

from cmpolicy_envs.pusht_states import dp_initial_state
from cmpolicy_eval import PROTOCOLS, get_protocol

# Seed -> the state handed to reset_to_state, and agent xy, block xy, angle after the reset.
DIFFUSION_POLICY = {
    0: (
        [222.0, 97.0, 217.0, 292.0, 3.0079994677219553],
        [222.0, 97.0, 222.993827, 381.599036, 3.007999],
    ),
    100_000: (
        [235.0, 124.0, 335.0, 128.0, -0.9049274284249247],
        [235.0, 124.0, 299.612885, 145.201581, 5.378258],
    ),
    100_499: (
        [203.0, 394.0, 119.0, 299.0, -8.666858724850943],
        [203.0, 394.0, 88.066472, 376.682057, 3.899512],
    ),
}
GYM = {
    0: [390.0, 304.0, 241.542556, 268.516974, 3.399037],
    100_000: [113.0, 100.0, 219.698495, 329.994579, 3.12607],
    100_499: [148.0, 114.0, 378.547795, 204.933136, 3.196113],
}


def start(name: str, seed: int) -> np.ndarray:
    protocol = get_protocol(name)
    env = protocol.make_env()
    _, info = env.reset(seed=seed, options=protocol.reset_options(seed))
    state: np.ndarray = info["state"]
    return state


@pytest.mark.parametrize("seed", DIFFUSION_POLICY)
def test_pusht_dp_starts_where_diffusion_policy_does(seed: int) -> None:
    given, placed = DIFFUSION_POLICY[seed]
    assert dp_initial_state(seed) == pytest.approx(given, abs=1e-12)
    np.testing.assert_allclose(start("pusht-dp", seed), placed, atol=1e-4)


def test_seed_0_is_the_first_human_demonstration() -> None:
    # data/state[0] of the public demonstrations, which were recorded from seed 0 on
    recorded = [222.0, 97.0, 222.99382, 381.59903, 3.0079994]
    np.testing.assert_allclose(start("pusht-dp", 0), recorded, atol=1e-4)


@pytest.mark.parametrize("seed", GYM)
def test_pusht_gym_starts_where_gym_pusht_does(seed: int) -> None:
    np.testing.assert_allclose(start("pusht-gym", seed), GYM[seed], atol=1e-4)


def test_both_run_300_steps_and_know_the_training_seeds() -> None:
    for protocol in PROTOCOLS.values():
        assert protocol.max_steps == 300
        assert protocol.default_seeds == (100_000, 100_499)
        assert protocol.training_seeds == (0, 205)


def test_a_slip_in_the_name_is_answered() -> None:
    with pytest.raises(ValueError, match="did you mean 'pusht-dp'"):
        get_protocol("pusht_dp")


def test_a_seed_that_no_generator_takes_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed -1 is outside"):
        dp_initial_state(-1)
