"""Memory, streams and graphs of a CUDA device, and what lives in such memory. Imports nothing of CUDA by itself."""
