"""Sampling: solvers, guidance, the rollout between two network calls, image sampling."""
