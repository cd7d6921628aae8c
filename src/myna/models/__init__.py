"""Models: folders and hub ids into transformers models and tokenizers.

Owns how a base model gets into memory: reading weights without pickle or remote code, settling the
special token ids once, and the BlueLM architecture with its tokenizer conversion. What is added to
a model afterwards belongs to `lora`, what is computed with it to `training` and `inference`.
"""
