"""What several mixers share: the line of tokens, convolutions along it, places on a grid, statistics that are measured."""
