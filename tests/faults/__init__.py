"""Faults on real roles and real servers, and what is held against every invariant afterwards."""
