"""Pages and tables about finished runs, made from the files in their output directories; no Paddle needed."""
