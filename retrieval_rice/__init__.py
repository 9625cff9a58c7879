"""Use of a RICE model: index, recognition, streams, demo, service and detector."""
