"""Speed and memory of the dual-path layer beside its peers and an ideal, as ratios measured in one run."""
