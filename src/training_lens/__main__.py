"""`python -m training_lens`: the command, where its script is not on the path."""

from training_lens.cli import main

main()
