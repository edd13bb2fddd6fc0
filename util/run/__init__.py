"""A run around its epochs: flags, launch, output folder, state, logs; for scripts and engines."""
