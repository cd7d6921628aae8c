"""Several processes on one run, started by torchrun.

Owns who takes part and what they add up. Which rows a process computes is decided in `training`.
"""
