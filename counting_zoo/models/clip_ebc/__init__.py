"""CLIP-EBC and its relatives: counting by classifying blocks."""
