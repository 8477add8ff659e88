"""Measurements that the README quotes: each prints what it measured beside what it must not exceed."""
