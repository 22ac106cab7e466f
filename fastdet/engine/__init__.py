"""From data sets to trained detectors, and from pictures to boxes."""
