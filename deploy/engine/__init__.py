"""TensorRT engines: building them from a typed ONNX graph, attesting their precision, and running them."""
