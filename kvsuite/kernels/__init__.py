"""The arithmetic of a compressed cache: each function is the reference that a kernel of the same signature must match."""
