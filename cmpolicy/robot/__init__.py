"""From policy to robot: chunking, control loop, safety, policy server and its client."""
