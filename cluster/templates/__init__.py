"""Templates: files that describe clusters. `filling` writes them, `checking` reports the problems of one."""
