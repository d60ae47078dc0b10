"""Fast and lean arithmetic for the frozen base: attention choice, lean layers, Triton kernels, capture."""
