"""Data of robustkit."""
