"""What ``cmpolicy-bench`` measures: training step, latency of a chunk, evaluation rollouts."""
