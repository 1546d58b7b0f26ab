"""Evaluate of robustkit."""
