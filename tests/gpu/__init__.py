"""What only a GPU can show: compiled kernels, recorded graphs, streams, GPU memory on the wire."""
