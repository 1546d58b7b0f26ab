"""Defenses of robustkit."""
