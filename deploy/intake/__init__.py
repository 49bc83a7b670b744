"""Makes a module of a name and weights, and an ONNX graph of the module."""
