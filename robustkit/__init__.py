"""Train, defend, compress and attack image classifiers, and compare them side by side."""

__version__ = "0.1.0"
