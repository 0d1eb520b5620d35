"""WHERE work runs and where bytes live. Knows Ray and object stores; nothing of compression."""
