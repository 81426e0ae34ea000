"""Where the work runs: Ray Data and Ray Train live here and nowhere else."""
