"""Commands, `python -m tools.NAME`, and what they share; imported by tests and scripts only."""
