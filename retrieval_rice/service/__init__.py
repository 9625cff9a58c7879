"""Recognition over HTTP: `rice serve`."""
