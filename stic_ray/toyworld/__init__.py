"""The embedded default world: drawn scenes, true sentences about them, a tiny model and its benchmarks."""
