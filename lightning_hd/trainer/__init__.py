"""The callback, and all else that knows Lightning."""
