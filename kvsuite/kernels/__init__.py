"""The arithmetic of a compressed cache: each is the reference a kernel of the same signature must match."""
