"""Graphs are built from a family's description, not traced."""
