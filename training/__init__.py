"""Shards to a registered model: Ray Train runs the loop, MLflow keeps the record."""
