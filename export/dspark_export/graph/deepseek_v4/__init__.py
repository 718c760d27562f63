"""The DeepSeek-V4 verifier, in ONNX Runtime's dialect."""
