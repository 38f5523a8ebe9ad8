"""Demonstrations of other layouts, converted to a store: see `robomimic`, `human`, `replay`."""
