"""Commands, `python -m tools.NAME`; imported by tests and scripts only."""
