"""Preference optimisation of causal language models with cached reference log-probs."""
