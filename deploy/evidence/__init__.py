"""Measurements with numpy alone: parity and timing."""
