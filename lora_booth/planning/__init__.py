"""Planning: what fits, from counted memory."""
