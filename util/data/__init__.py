"""Images: which there are, opening them, transforms, batches."""
