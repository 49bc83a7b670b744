"""`python -m deploy` is the command `deploy`."""

from deploy.cli import main

main()
