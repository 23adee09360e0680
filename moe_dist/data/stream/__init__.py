"""From cached tokens to batches: packing, lanes, the training loader, held-out batches, RoMA's neighbours."""
