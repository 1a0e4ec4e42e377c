"""Measuring: what a machine can do, how networks fare beside their peers, and pages and charts that show it."""
