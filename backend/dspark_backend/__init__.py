"""DSpark serving engine: continuous batching and lossless speculative decoding, independent of any server."""
