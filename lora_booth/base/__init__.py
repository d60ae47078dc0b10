"""BaseModel: families, loading, weights, quantization, and pictures of the base alone."""
