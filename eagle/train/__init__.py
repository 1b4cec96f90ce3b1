"""Training the draft: data set, losses, initialisation, loop, checkpoints."""
