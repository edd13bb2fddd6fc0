"""Files: atomic writes, downloads, checkpoint files, and the errors a user can act on."""
