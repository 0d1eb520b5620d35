"""Tools of development: they check the sources and are no part of the installed package."""
