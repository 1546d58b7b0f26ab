"""Defenses: each one a pure function on tensors and a thin plugin around it."""
