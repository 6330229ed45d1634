"""The cache that is both scored and timed: pages per kv head, a layer's cache over them, and how models plug in."""
