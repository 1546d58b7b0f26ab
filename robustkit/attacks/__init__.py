"""Attacks of robustkit."""
