"""Pure measuring with numpy alone: parity and timing."""
