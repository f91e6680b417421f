"""Reports of predictions and evaluations: HTML pages that need neither a network nor other files."""
