"""Preference optimisation of causal language models with cached reference log-probs."""

__version__ = "0.1.0"
