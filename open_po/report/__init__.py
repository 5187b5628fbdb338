"""One HTML page about runs, finished or not: figures, curves, settings, samples, the grids of sweeps."""
