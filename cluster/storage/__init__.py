"""Store artifacts and records in a folder or in an S3 bucket."""
