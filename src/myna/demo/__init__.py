"""The embedded demo: a tiny base model, a persona to teach it, held-out questions and their score.

Owns the files that `myna demo` trains on and judges by. The training itself is that of every run;
`cli/demo.py` puts them together. The base and the rows are made by `tools/`.
"""
