"""Serving: find a Triton, start it on a model repository, watch it, and clean up after it."""
