"""The algorithms, one script each, and `load_policy` for what they leave. Importing this package does not import JAX."""

from algos.policy import ExpandedPolicy, Policy, load_policy

__all__ = ["ExpandedPolicy", "Policy", "load_policy"]
