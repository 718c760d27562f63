"""Building TensorRT engines from exported graphs."""
