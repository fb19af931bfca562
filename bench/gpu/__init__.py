"""One run on a GPU: ceilings, kernels, decode steps, prefill, hand-off and interference, beside their floors."""
