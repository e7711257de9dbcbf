"""Slurm of Debian: slurmctld, slurmd and munged in a private directory, on ports of 127.0.0.1 of their own."""
