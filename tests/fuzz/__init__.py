"""Doors through which others' files come, each tried with thousands of broken ones: see door.py."""
