"""Subject: its photos, token and prompts."""
