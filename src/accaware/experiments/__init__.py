"""Experiments: data, models, training and run folders. Needs the extra `train`."""
