"""What a step is: the loss, the optimizer, what they change, and the compiled functions that do it."""
