"""The papers as functions: prompts, corruption, preference rows, objectives, scores. Needs no Ray."""
