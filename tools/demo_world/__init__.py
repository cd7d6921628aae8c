"""The small world of the demo: what its base model is pretrained on, and the rows that teach it."""
