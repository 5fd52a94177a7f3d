"""Candidates -> verdicts of a labeler under written principles."""
