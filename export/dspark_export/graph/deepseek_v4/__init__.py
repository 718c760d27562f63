"""DeepSeek-V4, verifier and drafter, in ONNX Runtime's dialect."""
