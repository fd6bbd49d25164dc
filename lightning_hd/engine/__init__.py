"""The engine: it tunes one optimizer, in any training loop."""
