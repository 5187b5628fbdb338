"""What a run prints and leaves behind: its folder, metrics, summary, tables, plots, trackers, the Hub."""
