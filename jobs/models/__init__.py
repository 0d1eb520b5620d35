"""Find, load, describe and write models: families, layouts, layers, tokenizers."""
