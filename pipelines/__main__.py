"""`python -m pipelines`."""

from pipelines import command

command.begin("stopped; what is finished is kept, the same command continues")

from pipelines.cli import main

command.leave(main)
