"""Pure functions from records to numbers. No torch."""
