"""Run tasks: in this process, or admitted, grouped into gangs and scaled with the work."""
