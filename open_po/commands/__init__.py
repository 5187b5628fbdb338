"""The commands of `python -m open_po`."""
