"""Metrics as pure numpy functions."""
