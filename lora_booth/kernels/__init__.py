"""Fast computation with little memory for the frozen base: attention, lean layers, Triton kernels, capture."""
