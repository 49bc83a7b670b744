"""From a name and weights to a module, and to ONNX."""
