"""What ``cmpolicy bench`` measures: steps, latency, rollouts, server, control loop, delay."""
