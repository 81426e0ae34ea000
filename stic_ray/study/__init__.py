"""How the gain grows with the pool: the pipeline over sizes, seeds and variants, its table, fits and report."""
