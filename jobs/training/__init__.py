"""Train a model: the DeepSpeed engine, losses, teachers, schedules, checkpoints."""
