"""What is captured while training runs."""
