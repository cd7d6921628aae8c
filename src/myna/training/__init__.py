"""The training loop and what it needs: schedule, checkpoints, events, held-out loss.

Owns a run from the first step to the last. Knows no files of data, no templates and no console: it
is handed examples and a model with an adapter, and reports through events.
"""
