"""What the papers' tables and figures need: comparisons, ablations, costs; a file a method."""
