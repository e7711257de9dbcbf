"""The commands that are clients of the HTTP API: what they may be told, and what each one asks for and shows."""
