"""The Hugging Face Hub: a run's repository, what is published to it and when, and how a run goes on from there."""
