"""Which samples a method breaks."""
