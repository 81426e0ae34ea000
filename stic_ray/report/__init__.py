"""The report of a run: a self-contained HTML page and the same facts as JSON, read from the run directory."""
