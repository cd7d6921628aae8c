"""Export: what was trained, in the forms that other programs load.

Owns merging an adapter into its base, and writing either for llama.cpp and Ollama. Nothing here
trains or answers; what cannot be exported truthfully is refused with the reason.
"""
