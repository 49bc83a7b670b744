"""Typed ONNX graph in, TensorRT engine out."""
