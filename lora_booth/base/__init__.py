"""BaseModel: families, loading, weights, quantization; what it draws by itself."""
