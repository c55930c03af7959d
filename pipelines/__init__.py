"""Raw ImageNet to sharded WebDataset tars. Ray Data is used in build.py alone."""
