"""Comparisons of several runs: ablations, tables of baselines, gains by group of clips, and attention in boxes."""
