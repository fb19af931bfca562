"""The model: config, weight sources, identity, and the decoder that turns a batch into logits."""
