"""Settings of ``cmpolicy image train``; the objectives and the optimizer are those of policies."""
