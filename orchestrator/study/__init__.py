"""The state machine of a study: events in, commands out, without I/O and without a clock."""
