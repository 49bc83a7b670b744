"""Where two artifacts of one network part: which layer, by how much, and whether it is a culprit or a victim."""
