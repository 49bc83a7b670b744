"""FP16 and bfloat16."""
