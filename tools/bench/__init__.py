"""What tools.benchmark measures and with what it compares; imported by it, tests and scripts."""
