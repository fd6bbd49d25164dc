"""The experiments of the paper, in a Lightning Trainer. See README.md."""
