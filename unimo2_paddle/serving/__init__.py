"""Using trained models: predictions from a checkpoint directory, retrieval from an index."""
