"""Recipe of robustkit."""
