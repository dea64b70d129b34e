"""Model definitions, readable top to bottom like the papers."""
