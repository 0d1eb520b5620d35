"""WHAT to try next, and what to keep. May import `jobs` and `cluster`."""
