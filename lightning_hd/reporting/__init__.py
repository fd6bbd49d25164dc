"""What is recorded, logged, summarized and drawn."""
