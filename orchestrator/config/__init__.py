"""The study file: its schema, and how it is read and checked."""
