"""Which layers, the scheme, INT8 per runtime, ONNX graphs, low bits, fake quantizers, NF4."""
