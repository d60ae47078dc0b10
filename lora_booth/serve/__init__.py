"""Pictures over HTTP, for many callers at once: `lora-booth serve`."""
