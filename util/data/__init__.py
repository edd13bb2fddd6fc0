"""Images: listing, opening, transforms, batches; for util.datasets, util.vis, util.eval, tools and
the main scripts."""
