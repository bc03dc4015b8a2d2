"""Measurements that are no training run."""
