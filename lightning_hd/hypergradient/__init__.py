"""What is seen of the model: gradients, and how the parameters moved."""
