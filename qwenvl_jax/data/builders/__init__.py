"""Builders that turn sources into record files."""
