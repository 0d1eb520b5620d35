"""What a cloud announces and charges: preemption notices and prices."""
