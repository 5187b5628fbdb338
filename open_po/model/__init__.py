"""From model files to the log-probs of packs: loading, numerics, layouts, adapters, scoring, export."""
