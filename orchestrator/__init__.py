"""Studies: decide which candidates to try, run them, and publish the front. May import `jobs` and `cluster`."""
