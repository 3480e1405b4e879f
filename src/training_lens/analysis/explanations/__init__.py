"""Explanations of a finished adapter: which modules and rows made it, and why one answer changed.

Each carries its own check, an identity or a measured counterfactual, and is inconclusive where that fails.
"""
