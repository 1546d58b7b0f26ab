"""Poisoned training data: what an adversary plants there, and what it does to test images."""
