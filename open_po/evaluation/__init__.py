"""Held-out evaluation: preference metrics from log-probs, exact match from generated answers."""
