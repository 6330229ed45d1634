"""Views of what was measured, one file each. No torch."""
