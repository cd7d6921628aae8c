"""Pictures of a run, made from `events.jsonl` alone.

Owns what a person looks at after training. Knows neither models nor data.
"""
