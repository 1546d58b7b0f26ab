"""Models of robustkit."""
