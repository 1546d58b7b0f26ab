"""Names of plugins: where each lives, which parameters it takes, and how to make one. Imports no plugin until asked."""

from __future__ import annotations
