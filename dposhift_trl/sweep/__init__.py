"""A sweep: stage 1 once, stage 2 for every combination of values, and a comparison of the results."""
