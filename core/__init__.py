"""What the three roles share: the vocabulary, the decisions, the statements, the wires."""

__version__ = "0.1.0"
