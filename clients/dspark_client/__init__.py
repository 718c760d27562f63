"""Thin clients of the dspark model."""
