"""`python -m neutralize` is the command `neutralize`."""

from neutralize.cli import main

main()
