"""Shared by several test modules, none of which imports another."""
