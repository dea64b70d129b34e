"""One module per on-disk format; plain Python and numpy only."""
