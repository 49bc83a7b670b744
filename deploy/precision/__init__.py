"""ONNX graph in, ONNX graph of another precision out: one pass a file."""
