"""The decode worker: receives KV, and emits one token per step and sequence, never interrupted by a prompt."""
