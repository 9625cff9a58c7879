"""What an evaluation leaves in its folder: results.json, rankings, pictures and the HTML page."""
