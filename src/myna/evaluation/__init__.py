"""Judging a trained adapter: losses, answers side by side, metrics, and what was forgotten.

Owns the judgement. Rows come from `data`, losses from `training`, answers from `inference`; what a
person sees of it is `cli`'s.
"""
