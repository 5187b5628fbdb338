"""One run: its steps, their state, its checkpoints."""
