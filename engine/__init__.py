"""What both workers compute with: blocks, KV memory, sequences, batches, runner, sampler, and the service shell."""
