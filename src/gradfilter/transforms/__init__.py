"""Small transforms of gradients, and the combinators that compose them into one update."""
