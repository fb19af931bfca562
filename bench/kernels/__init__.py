"""Each kernel beside its floor: bytes over measured bandwidth, or operations over measured peak."""
