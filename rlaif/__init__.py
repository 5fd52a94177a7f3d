"""Align language models with AI feedback: label, train a preference model, run PPO, compare."""

__version__ = "0.1.0"
