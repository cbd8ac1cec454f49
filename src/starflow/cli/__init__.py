"""The commands of `starflow`: each is a class of options and a library call, and `main` has the table of them."""
