"""Running trained models over images, and reports."""
