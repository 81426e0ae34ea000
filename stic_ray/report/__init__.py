"""The report of a run: one self-contained HTML page and the same facts as JSON, read from the run directory alone."""
