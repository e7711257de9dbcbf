"""The worker: registers its node, consumes its stream, supervises scripts, serves their output."""
