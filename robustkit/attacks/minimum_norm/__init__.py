"""Attacks that look for the smallest change that fools the model, not for any change within a budget."""
