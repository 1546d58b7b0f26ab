"""Compress of robustkit."""
