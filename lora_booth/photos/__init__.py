"""Photos: find, open, crop, audit, masks."""
