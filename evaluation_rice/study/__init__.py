"""Several runs beside each other: ablations, tables of baselines, gains of a part, and where a model looks."""
