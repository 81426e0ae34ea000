"""The words of a run: configuration, tables, run directory, errors. Needs no torch and no Ray."""
