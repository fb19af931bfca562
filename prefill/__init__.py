"""The prefill worker: computes prompts in chunks, pushes their KV while computing, samples the first token."""
