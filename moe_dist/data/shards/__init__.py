"""Raw WebDataset tars: finding, checking, reading and writing them; decoded samples."""
