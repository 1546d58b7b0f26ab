"""Train of robustkit."""
