"""Speed and memory comparisons; each module is a command with its last result in ``results/``."""
