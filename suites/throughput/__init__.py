"""How fast every method, or every server, is."""
