"""Certificates of robustkit: lower bounds of robust accuracy."""
