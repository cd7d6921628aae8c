"""From files to token ids: reading, mapping to conversations, templates, encoding, batching.

Owns everything between a path and the ids a model is trained on. Knows no models: a tokenizer and a
template are handed in.
"""
