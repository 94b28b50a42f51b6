"""Runtimes of edge packages, each in a process of its own, behind one protocol."""
