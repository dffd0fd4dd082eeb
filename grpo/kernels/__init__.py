"""What is there for speed alone. Without it everything works, slower, and gives the same numbers to rounding."""
