"""Planning: which settings fit, from counted memory."""
