"""Files and errors: atomic writes, downloads, checkpoint files; imported by everything."""
