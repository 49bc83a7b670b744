"""Sessions: one opened artifact each, whatever runs it."""
