"""The fastest mix of INT8 and floating point inside an accuracy budget."""
