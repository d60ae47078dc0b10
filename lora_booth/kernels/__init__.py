"""Fast computation with little memory for the frozen base: attention choice, lean layers, Triton kernels, capture."""
