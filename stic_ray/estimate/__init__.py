"""What a run will take, before anything is spent: images, tokens, GPU-hours, money, bytes, time."""
