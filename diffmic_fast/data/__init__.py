"""Images with labels: sources, splits, transforms and datasets."""
