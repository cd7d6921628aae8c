"""The command line: one small file per command.

Owns arguments, printing and exit codes, and puts the other packages together. Importing it loads no
torch: commands import what they need when they run.
"""
