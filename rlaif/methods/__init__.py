"""Training methods; each module owns its control flow and reads from top to bottom."""
