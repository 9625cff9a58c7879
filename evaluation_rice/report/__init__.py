"""The output files of an evaluation: results.json, rankings, pictures and the HTML page."""
