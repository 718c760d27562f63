"""The int8 precision: what a calibration pass decides, and how good the result is."""
