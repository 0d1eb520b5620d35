"""Check a study and prepare it: search space, costs, resources, initial design."""
