"""Everything between a folder and the Hub: reading checkpoints, cards, publishing, converting, exporting."""
