"""Running a trained model over images: features, predictions, reports; for tools and mains."""
