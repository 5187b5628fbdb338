"""Ranks: who runs what, and what they tell one another."""
