"""From images to statistics to thresholds. Imports neither `deploy` nor `models`."""
