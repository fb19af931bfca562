"""Moving KV blocks between workers: transports, endpoints, block sessions. It never sees the block pool."""
