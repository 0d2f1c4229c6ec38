"""Quantization: where a network is rounded, to which steps, and what is done about the error."""
