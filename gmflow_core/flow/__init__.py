"""The flow-matching path: conversions, transitions, posteriors, policies, losses."""
