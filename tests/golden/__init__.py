"""Golden outputs of the reference implementation, and the scripts that make them."""
