"""The command line: `page4d COMMAND ...`, one module per command."""
