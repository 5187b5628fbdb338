"""What there is to run: training, the reference cache, scores, sweeps."""
