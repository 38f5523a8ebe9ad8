"""Generators of demonstration data; these may use the simulators of `cmpolicy_envs`."""
