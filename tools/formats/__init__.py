"""Formats of others: models of timm and transformers, data sets; imported by the commands."""
