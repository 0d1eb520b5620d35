"""HOW one model becomes smaller, and how it is measured. Knows torch; never Ray, MLflow or S3."""
