"""The command line: `./run COMMAND …`, or `python -m crosslogic.cli COMMAND …`."""
