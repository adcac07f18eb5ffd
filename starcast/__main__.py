"""`python -m starcast` is the `starcast` command."""

from starcast.main import main

main()
