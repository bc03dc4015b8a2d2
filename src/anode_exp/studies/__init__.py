"""Measurements other than training runs."""
