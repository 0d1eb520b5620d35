"""What is measured and stated in benchmarks/LOG.md; none of it is a test."""
