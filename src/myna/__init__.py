"""myna: LoRA fine-tuning of chat models without silent mistakes and without wasted work.

Importing the package loads no torch; `myna.cli` is the command line, the folders hold the library.
"""

__version__ = "0.1.0"
