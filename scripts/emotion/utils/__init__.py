"""Errors, files, machine, command line and the Hub: what everything else builds on."""
