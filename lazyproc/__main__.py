"""`python -m lazyproc`: the command line, where its script is not on the path."""

from lazyproc.cli import main

main(prog_name="lazyproc")
