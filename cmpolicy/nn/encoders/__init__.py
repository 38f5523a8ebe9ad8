"""Observation encoders: what they make of a history of observations goes to the network."""
