"""Reading, writing and converting weights and training state."""
