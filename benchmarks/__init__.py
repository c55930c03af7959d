"""One small script per claim; README.md holds the results, LOG.md what was tried and failed."""
