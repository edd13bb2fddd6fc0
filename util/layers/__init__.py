"""Building blocks of the models; imported by models_*.py, util/build.py, util/vis and tools."""
