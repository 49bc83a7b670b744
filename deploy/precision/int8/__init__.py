"""FP32 ONNX graph in, explicit symmetric INT8 Q/DQ graph out: one step a file."""
