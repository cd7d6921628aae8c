"""Inference: a base model or an adapter that answers.

Owns how what was trained is loaded to talk, how answers are generated, and what a conversation of
several turns sends. How a prompt becomes token ids is `data.encode`'s, the same for training and
here; sampling itself is transformers' `generate`. Terminals and files belong to `cli`.
"""
