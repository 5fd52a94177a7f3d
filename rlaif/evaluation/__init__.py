"""Measuring policies, preference models and labelers."""
