"""Figures of what a model does."""
