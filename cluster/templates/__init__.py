"""Templates: clusters as files. `filling` writes them, `checking` says what is wrong with one."""
