"""kvsuite: is a KV-cache compression method worth deploying? One cache is both scored and timed."""

__version__ = "0.2.0"
