"""How long a job takes on an idle system, and how many a second a busy one ends: `python -m bench`."""
