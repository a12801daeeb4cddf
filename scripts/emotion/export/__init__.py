"""ONNX export and graph optimization, and the peers that other libraries make."""
