"""Precisions of products: what a calibration pass decides, how weights are rounded, and how good the result is."""
