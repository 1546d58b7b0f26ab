"""Report of robustkit."""
