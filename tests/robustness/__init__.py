"""Tests of robustness: hostile files and inputs, kills, full disks, long runs of a server."""
