"""Peers of the scoring loop: the same work in other frameworks, a file and a process each."""
