"""The command `instantrt`: one module a subcommand, which parses and prints.

start.py begins, app.py has the table of the subcommands and imports the one that is called; options.py makes options of
the groups that compiler/options.py holds; console.py and show*.py print; ending.py turns errors into exit statuses. A
subcommand's module imports what is heavy inside of its function: `--help` and completion load the module, too.
"""
