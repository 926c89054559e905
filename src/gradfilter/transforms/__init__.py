"""What is done to gradients: small links, and the combinators that make them into one update."""
