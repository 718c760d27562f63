"""The two models of speculative decoding, behind one small protocol."""
