"""What a run does around its epochs: flags, launch, state, log."""
