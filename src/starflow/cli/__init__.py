"""The commands: one typed config and one library call each; `main` holds their table."""
